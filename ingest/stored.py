"""The plan that a cube keeps of itself, and what of a plan from a file may be opened.

A cube remembers how it was made in `_terrashard/plan.json`: the whole plan with unsigned hrefs. Repairing, appending
and auditing begin there. A plan is data from outside like a catalogue: its hrefs are judged again before one is opened.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from ingest.config import IngestConfig
from ingest.hrefs import HrefPolicy, is_url, refuse_private_address, resolve_href, strip_signature
from ingest.plan import Plan
from ingest.providers import PROVIDERS
from ingest.task import SourceAsset
from zarr_store.backends import open_store, store_for
from zarr_store.errors import AccessError, InvalidInput
from zarr_store.read import is_cube, open_cube
from zarr_store.store import Kind

__all__ = ["PLAN_KEY", "begun_plan", "check_hrefs", "keep_plan", "kept_plan"]

log = logging.getLogger(__name__)

PLAN_KEY = "_terrashard/plan.json"


def kept_plan(url: str | os.PathLike[str]) -> Plan:
    """The plan that a cube was made by, and with which it is repaired or continued.

    Raises:
        NotACube: Nothing is there, or something else.
        InvalidInput: The cube keeps no plan, or it was changed.
    """
    open_cube(url)
    data = open_store(url).read(PLAN_KEY)
    if data is None:
        raise InvalidInput(
            f"{url} keeps no plan ({PLAN_KEY} is absent): repeat the `terrashard ingest` command that made it once, "
            "which writes it and nothing else"
        )
    return Plan.from_json(data, f"{url}/{PLAN_KEY}")


def begun_plan(url: str | os.PathLike[str], plan: Plan, kind: Kind | None = None) -> Plan:
    """The plan that a run of `plan` goes on with: the cube's own where they differ only in which scene wins.

    Which scene wins follows from pixels that were looked at when a plan was made. Where some could not be read then and
    can be now, the cube is finished in the order in which it was begun.

    Args:
        url: Where the cube is, or will be.
        plan: What is to be made.
        kind: What is to hold it, as for `zarr_store.create.create_cube`.
    """
    store = store_for(url, kind)
    data = store.read(PLAN_KEY) if store.exists() and is_cube(store) else None
    if data is None or json.loads(data).get("digest") == plan.digest:
        return plan
    try:
        kept = Plan.from_json(data, f"{url}/{PLAN_KEY}")
    except InvalidInput:  # of another release; whether it is the same cube is judged by its metadata
        return plan
    if kept.unordered_digest != plan.unordered_digest:
        return plan
    log.info("%s: the order of scenes stays the one that it was begun with", url)
    return kept


def keep_plan(url: str | os.PathLike[str], plan: Plan) -> None:
    """Write the plan into the cube if another one is there; only under the cube's lock.

    Raises:
        InvalidInput: An href carries a signature, which must not be stored.
    """
    for asset in _assets(plan):
        _refuse_signature(asset)
    data = plan.to_json().encode()
    store = open_store(url)
    if store.read(PLAN_KEY) != data:
        store.write(PLAN_KEY, data)


def check_hrefs(plan: Plan, config: IngestConfig) -> None:
    """Judge every href of a plan by the rules for hrefs of a catalogue, before one is opened.

    The plan's own source counts as SOURCE, but for private addresses: those need --allow-private-hosts, as a plan may
    come from somebody else.

    Raises:
        InvalidInput: An href may not be opened; the message names scene and asset.
    """
    names = {str(row.get("provider")) for rows in plan.items.values() for row in rows}
    hosts = [host for rule in (*config.providers, *PROVIDERS) if rule.name in names for host in rule.hosts]
    source = plan.source
    policy = HrefPolicy.of(source, config, hosts)
    if is_url(source) and not config.allow_private_hosts:
        _refuse_private_source(source)
    seen: set[str] = set()
    for asset in _assets(plan):
        if asset.href in seen:
            continue
        seen.add(asset.href)
        _refuse_signature(asset)
        where = f"scene {asset.scene!r}, asset {asset.key!r} of the plan"
        try:
            resolved = resolve_href(asset.href, base="/", policy=policy)
        except InvalidInput as refusal:
            raise InvalidInput(f"{where}: {refusal}") from refusal
        if resolved != asset.href:
            raise InvalidInput(f"{where}: its href is not absolute and plain; plan again")
    for href in {urlsplit(h).netloc: h for h in sorted(seen) if is_url(h)}.values():
        with suppress(AccessError):
            refuse_private_address(href, policy)


def _refuse_private_source(source: str) -> None:
    believed = HrefPolicy(hosts=frozenset({(urlsplit(source).hostname or urlsplit(source).netloc).lower()}))
    try:
        resolve_href(source, base=source, policy=believed)
        with suppress(AccessError):  # an unknown name is the error of each asset behind it
            refuse_private_address(source, believed)
    except InvalidInput as refusal:
        raise InvalidInput(f"the plan's source: {refusal}") from refusal


def _assets(plan: Plan) -> Iterable[SourceAsset]:
    for task in plan.tasks:
        for scene in task.sources:
            yield from scene.assets


def _refuse_signature(asset: SourceAsset) -> None:
    if strip_signature(asset.href) != asset.href:
        raise InvalidInput(
            f"scene {asset.scene!r}, asset {asset.key!r} of the plan: its href carries a signature or key, which must "
            "not be stored; plan again (hrefs are signed when they are read, see --sign)"
        )
