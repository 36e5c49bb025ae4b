"""The plan that a cube keeps, and which files of a stored plan may be opened.

A cube keeps the plan that made it in `_terrashard/plan.json`: the whole plan, with unsigned hrefs. Repairing, appending
and auditing begin there. A stored plan is data from outside, like a catalogue, as a cube may come from somebody else.
So its hrefs are checked before one is opened, by what the user types today and never by what the plan states.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from ingest.plan.plan import Plan
from ingest.plan.plan_file import stated_digest
from ingest.plan.task import ShardTask, SourceAsset
from ingest.request.config import IngestConfig
from ingest.trust.hrefs import HrefPolicy, is_spelled_address, is_url, refuse_private_address, resolve_href
from ingest.trust.providers import GENERIC, PROVIDERS
from ingest.trust.redact import redact_url, strip_signature
from zarr_store.backends import open_store, store_for
from zarr_store.errors import AccessError, InvalidInput
from zarr_store.read import is_cube, open_cube
from zarr_store.store import Kind, Store

__all__ = [
    "PLAN_KEY",
    "check_hrefs",
    "check_kept_source",
    "keep_plan",
    "kept_digest",
    "kept_plan",
    "needed_options",
    "require_providers",
    "resume_plan",
]  # fmt: skip

log = logging.getLogger(__name__)

PLAN_KEY = "_terrashard/plan.json"
"""Key of the plan in the store of a cube."""


def kept_plan(url: str | os.PathLike[str]) -> Plan:
    """Return the plan that made a cube; repairs and later runs begin from it.

    Raises:
        NotACube: There is no cube at `url`.
        InvalidInput: The cube keeps no plan, or the plan was changed.
    """
    open_cube(url)
    store = open_store(url)
    if not store.exists(PLAN_KEY):
        raise InvalidInput(
            f"{url} keeps no plan ({PLAN_KEY} is absent): repeat the `terrashard ingest` command that made it once, "
            "which writes it and nothing else"
        )
    return Plan.from_file(lambda: store.stream(PLAN_KEY), f"{url}/{PLAN_KEY}")


def kept_digest(url: str | os.PathLike[str]) -> str | None:
    """Return the digest that the plan of a cube states; None where the cube keeps no plan."""
    store = open_store(url)
    return _stated(store) if store.exists(PLAN_KEY) else None


def _stated(store: Store) -> str | None:
    with store.stream(PLAN_KEY) as stream:
        return stated_digest(stream)


def resume_plan(url: str | os.PathLike[str], plan: Plan, kind: Kind | None = None) -> Plan:
    """Choose the plan that a run continues with: the cube's own if it differs from `plan` only in which scenes win.

    A cube that an earlier release began is continued by the rules of that release for pixels, so its shards keep their
    keys.

    The order in which scenes win depends on pixels that were read when the plan was made. If more of them can be read
    now, the cube is still finished in the order in which it was begun.

    Args:
        url: Address of the cube, which may not exist yet.
        plan: Plan of the run.
        kind: Kind of store, as for `zarr_store.create.create_cube`.
    """
    store = store_for(url, kind)
    if not (store.exists() and is_cube(store)):
        return plan
    if not store.exists(PLAN_KEY):
        first = plan.under_rules({spec.collection: 1 for spec in plan.specs})
        return first if open_cube(url).provenance.get("plan") == first.digest else plan
    if _stated(store) == plan.digest:
        return plan
    try:
        kept = Plan.from_file(lambda: store.stream(PLAN_KEY), f"{url}/{PLAN_KEY}")
    except InvalidInput:  # a plan of another release; the metadata show whether it is the same cube
        return plan
    plan = plan.under_rules({recipe.spec.collection: recipe.version for recipe in kept.recipes})
    if kept.unordered_digest != plan.unordered_digest:
        return plan
    log.info("%s: scenes keep the order in which the cube was begun", url)
    return kept


def keep_plan(url: str | os.PathLike[str], plan: Plan) -> None:
    """Write the plan into the cube unless it is there already; the caller holds the cube's lock.

    Raises:
        InvalidInput: An href carries a signature, which must not be stored.
    """
    for scene in {id(scene): scene for task in plan.tasks for scene in task.sources}.values():
        for asset in scene.assets:
            _refuse_signature(asset)
    store = open_store(url)
    made = hashlib.sha256()
    for piece in plan.pieces():
        made.update(piece)
    if store.digest(PLAN_KEY) != made.hexdigest():
        store.begin(PLAN_KEY, plan.pieces()).finish()


def check_hrefs(plan: Plan, config: IngestConfig, *, typed: str = "", tasks: Iterable[ShardTask] | None = None) -> None:
    """Check the hrefs of a plan by the rules for hrefs of a catalogue, before one is opened.

    A plan may come from somebody else, so the source that it states gives no trust. Trusted are the hosts of known
    providers, what the user typed (SOURCE, or the folder of plan.json), and the options of today's command.

    Args:
        plan: Plan from a file, or from the cube that keeps it.
        config: Settings of trust.
        typed: SOURCE or plan.json as the user typed it; empty where only a cube was named.
        tasks: Tasks that will run; None for all.

    Raises:
        InvalidInput: An href may not be opened; the message names scene, asset, and the option that would allow it.
    """
    rules = (*config.trust.providers, *PROVIDERS)
    named = _provider_names(plan)
    policy = config.trust.href_policy(typed, [host for rule in rules if rule.name in named for host in rule.hosts])
    if is_url(plan.source) and not policy.allows_private((urlsplit(plan.source).hostname or "").lower()):
        _refuse_private_source(plan.source)
    refused: dict[str, tuple[str, InvalidInput]] = {}
    seen: set[str] = set()
    for asset in _assets(plan.tasks if tasks is None else tasks):
        if asset.href in seen:
            continue
        seen.add(asset.href)
        _refuse_signature(asset)
        where = f"scene {asset.scene!r}, asset {asset.key!r} of the plan"
        try:
            resolved = resolve_href(asset.href, base="/", policy=policy, resolved=True)
        except InvalidInput as refusal:
            refused[asset.href] = where, refusal
            continue
        if resolved != asset.href:
            raise InvalidInput(f"{where}: its href is not absolute and plain; plan again")
    if refused:
        where, first = next(iter(refused.values()))
        unknown = named - {rule.name for rule in (*rules, GENERIC)}
        raise InvalidInput(f"{where}: {first}{_advice(plan, refused, unknown)}")
    for href in {urlsplit(h).netloc: h for h in sorted(seen) if is_url(h)}.values():
        with suppress(AccessError):
            refuse_private_address(href, policy)


def check_kept_source(plan: Plan, config: IngestConfig, url: str) -> str:
    """Return the source that a cube states for its scenes, if today's options or the list of providers trust it.

    Raises:
        InvalidInput: They do not trust it; the message states what to type.
    """
    hosts = [host for rule in (*config.trust.providers, *PROVIDERS) for host in rule.hosts]
    policy = config.trust.href_policy("", hosts)
    try:
        if not is_url(plan.source):
            return resolve_href(plan.source, base="/", policy=policy, resolved=True)
        resolve_href(plan.source, base=plan.source, policy=policy)
        with suppress(AccessError):
            refuse_private_address(plan.source, policy)
    except InvalidInput as refusal:
        raise InvalidInput(
            f"{url} states that its scenes came from {redact_url(plan.source)!r}, which is not trusted, as a cube may "
            f"come from somebody else ({refusal}). If you trust that place, type it: --source {redact_url(plan.source)}"
        ) from refusal
    return plan.source


def require_providers(plan: Plan, config: IngestConfig) -> None:
    """Refuse to search for more scenes of a cube without the provider rules that its scenes were read with.

    Raises:
        InvalidInput: Scenes of the plan are of a provider that is neither built in nor in a file that the user gave.
    """
    known = {rule.name for rule in (*config.trust.providers, *PROVIDERS, GENERIC)}
    if unknown := sorted(_provider_names(plan) - known):
        raise InvalidInput(
            f"the cube has scenes of provider {', '.join(unknown)}, which is not built in; give its file again with "
            "--provider-file FILE"
        )


def _provider_names(plan: Plan) -> set[str]:
    return {str(row["provider"]) for rows in plan.items.values() for row in rows if row.get("provider")}


def needed_options(plan: Plan, typed: str) -> list[str]:
    """Return the options of trust that a command needs to run the plan in the file `typed`."""
    named = _provider_names(plan)
    policy = IngestConfig().trust.href_policy(
        typed, [h for rule in PROVIDERS if rule.name in named for h in rule.hosts]
    )
    refused = []
    for href in dict.fromkeys(asset.href for asset in _assets(plan.tasks)):
        try:
            resolve_href(href, base="/", policy=policy, resolved=True)
        except InvalidInput:
            refused.append(href)
    return _options(plan, refused, named - {rule.name for rule in (*PROVIDERS, GENERIC)})


def _options(plan: Plan, refused: Collection[str], unknown: Collection[str]) -> list[str]:
    """Return the options that would allow some hrefs of a plan."""
    options = []
    hosts = {(urlsplit(href).hostname or "").lower() for href in refused if is_url(href)}
    private = {host for host in hosts if is_spelled_address(host)}
    options += ["--allow-private-hosts"] if private else []
    options += [f"--allow-host {shlex.quote(host)}" for host in sorted(hosts - private)[:4]] if not unknown else []
    folders = [href.rpartition("/")[0] for href in refused if href.startswith("/") and not href.startswith("//")]
    if folders:
        common = os.path.commonpath(folders)
        home = "" if is_url(plan.source) else plan.source.rpartition("/")[0]
        # the folder of the catalogue if all files lie in it; never a folder that holds everything
        folder = home if home and Path(common).is_relative_to(home) else common
        options += [f"--allow-local {shlex.quote(folder)}"] if folder.count("/") > 1 else []
    if unknown:
        options.append("--provider-file FILE (the rules of " + ", ".join(sorted(unknown)) + ")")
    return options


def _advice(plan: Plan, refused: Collection[str], unknown: Collection[str]) -> str:
    options = _options(plan, refused, unknown)
    if not options:
        return ""
    return (
        f". {len(refused)} files of the plan are outside what this command names; a plan may come from somebody else "
        f"and is not trusted. If you trust those places, add {' and '.join(options)}"
    )


def _refuse_private_source(source: str) -> None:
    believed = HrefPolicy(hosts=frozenset({(urlsplit(source).hostname or urlsplit(source).netloc).lower()}))
    try:
        resolve_href(source, base=source, policy=believed)
        with suppress(AccessError):  # an unknown host name becomes the error of each of its assets
            refuse_private_address(source, believed)
    except InvalidInput as refusal:
        raise InvalidInput(f"the plan's source: {refusal}") from refusal


def _assets(tasks: Iterable[ShardTask]) -> Iterable[SourceAsset]:
    for task in tasks:
        for scene in task.sources:
            yield from scene.assets


def _refuse_signature(asset: SourceAsset) -> None:
    if strip_signature(asset.href) != asset.href:
        raise InvalidInput(
            f"scene {asset.scene!r}, asset {asset.key!r} of the plan: its href carries a signature or key, which must "
            "not be stored; plan again (hrefs are signed when they are read, see --sign)"
        )
