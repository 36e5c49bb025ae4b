"""What a cube, a plan or an item says of itself opens nothing: only today's command does (FAULTS X03, X04, X05)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import urllib3

import ingest.trust.buckets
from ingest.plan.plan import Plan
from ingest.plan.stored import PLAN_KEY, check_hrefs, kept_plan
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.request.trust import Trust
from ingest.run.loop import run
from ingest.scenes.search import find_scenes
from ingest.trust.buckets import bucket_url
from ingest.trust.providers import ProviderRule, find_provider, trusted_hosts
from ingest.trust.sign import SignRule, signed
from ingest.upkeep.audit import audit
from ingest.upkeep.checksums import verify_files
from ingest.upkeep.extend import extend, plan_extension, selection_of
from ingest.upkeep.repair import repair, retry_failed, verify_sources
from zarr_store.errors import AssetUnreadable, InvalidInput
from zarr_store.read import open_cube
from zarr_store.verify import verify_cube
from zarr_store.write import shard_key

from ..growing import NAME, plan_of, scene, tree

TRUSTING: dict[str, Any] = {
    "allow_private_hosts": True, "allow_local": ["/"], "allow_hosts": ["evil.example"], "requester_pays": True,
            "sign": "planetary-computer"}  # fmt: skip


@pytest.fixture
def cube(tmp_path: Path, local_client: Any) -> Path:
    folder = tmp_path / "stranger"
    run(plan_of([scene(folder / "s", day) for day in (10, 12)]), folder / "cube.zarr", client=local_client)
    return folder / "cube.zarr"


def forge(cube: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the plan of a cube say something else of itself, with a digest that fits."""
    path = cube / PLAN_KEY
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))
    digest = document["digest"]
    monkeypatch.setattr(Plan, "digest", property(lambda self: digest))


def aim(cube: Path, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hrefs of a cube's plan lead elsewhere, with digest and keys that fit."""
    text = (cube / PLAN_KEY).read_text()
    assert old in text
    text = text.replace(old, new)
    (cube / PLAN_KEY).write_text(text)
    digest = json.loads(text)["digest"]
    monkeypatch.setattr(Plan, "digest", property(lambda self: digest))
    keys = {task.index: task.key for task in kept_plan(cube).tasks}
    for row in (cube / "_terrashard/ledger" / NAME).glob("*.json"):
        document = json.loads(row.read_text())
        row.write_text(json.dumps(document | {"key": keys[tuple(document["index"])]}))


def test_a_plan_keeps_no_trust_and_gives_none(cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = IngestConfig(bands=("red", "scl"), **TRUSTING)
    assert set(TRUSTING) < set(Trust.model_fields)
    made = plan_of([scene(tmp_path / "t", 10)], config=config)
    assert set(Trust.model_fields).isdisjoint(made.config)
    assert set(Trust.model_fields).isdisjoint(made.provenance()["config"])
    forge(cube, monkeypatch, config={"bands": ["red", "scl"], **TRUSTING})
    assert selection_of(cube) == {"bands": ["red", "scl"]}


@pytest.mark.parametrize("with_flag", [False, True])
def test_a_cube_that_names_a_private_source_is_not_asked_about_it(
    cube: Path, server: Any, make_item: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, with_flag: bool
) -> None:
    server.json("/items.json", {"type": "FeatureCollection", "features": [make_item()]})
    source = f"{server.url}/items.json"
    forge(cube, monkeypatch, source=source, config={"bands": ["red", "scl"], **TRUSTING})
    config = IngestConfig(**{**selection_of(cube), "allow_private_hosts": with_flag})
    if with_flag:
        assert audit(cube, config, files=False).missing
        assert server.requests
        return
    with pytest.raises(InvalidInput, match=f"--source {source}"):
        audit(cube, config)
    assert server.requests == []
    assert audit(cube, config, source=source, files=False).missing, "what is typed is trusted"


def test_a_cube_that_names_a_local_source_or_a_strange_host_is_not_believed(
    cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (str(tmp_path / "private" / "catalog.json"), "https://evil.example/stac", "https://me:pw@h.example/"):
        forge(cube, monkeypatch, source=source)
        with pytest.raises(InvalidInput, match="--source ") as caught:
            audit(cube, IngestConfig())
        assert "pw" not in str(caught.value)


def break_one(cube: Path) -> None:
    (cube / shard_key(open_cube(cube).spec(NAME), "scl", (0, 0, 0))).unlink()
    assert verify_cube(cube).damage, "the fault fired"


DOORS: dict[str, Callable[[Path, IngestConfig, Any], Any]] = {
    "repair": lambda cube, config, client: repair(cube, config, client=client),
    "verify --sources": lambda cube, config, client: verify_sources(cube, config),
    "verify --checksums": lambda cube, config, client: verify_files(cube, config),
}


@pytest.mark.parametrize("door", DOORS)
def test_files_of_a_kept_plan_are_opened_only_where_todays_command_says(
    cube: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    """The plan says that its source is `/`, and so that every file is the source's own."""
    forge(cube, monkeypatch, source="/catalog.json", config=dict(TRUSTING))
    break_one(cube)
    before = tree(cube)
    with pytest.raises(InvalidInput, match=f"--allow-local {cube.parent}"):
        DOORS[door](cube, IngestConfig(), local_client)
    assert tree(cube) == before
    DOORS[door](cube, IngestConfig(allow_local=(str(cube.parent),)), local_client)


@pytest.mark.parametrize("door", [*DOORS, "retry"])
def test_hosts_of_a_kept_plan_are_asked_only_where_todays_command_says(
    cube: Path, local_client: Any, server: Any, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    aim(cube, f'"{cube.parent}/s/', f'"{server.url}/', monkeypatch)
    forge(cube, monkeypatch, source=f"{server.url}/", config=dict(TRUSTING))
    doors = {**DOORS, "retry": lambda cube, config, client: retry_failed(cube, config, client=client)}
    if door == "retry":
        row = cube / "_terrashard/ledger" / NAME / "0-0-0.json"
        row.write_text(json.dumps(json.loads(row.read_text()) | {"state": "failed"}))
    elif door == "repair":
        break_one(cube)
    config = IngestConfig(retries=0, timeout_s=2.0)
    with pytest.raises(InvalidInput, match="--allow-private-hosts"):
        doors[door](cube, config, local_client)
    assert server.requests == []
    doors[door](cube, config.model_copy(update={"allow_private_hosts": True}), local_client)
    assert server.requests or door == "verify --checksums"


def test_what_is_complete_needs_no_trust(cube: Path, local_client: Any) -> None:
    """Nothing is opened, so nothing has to be allowed."""
    assert repair(cube, IngestConfig(), client=local_client).ingest.exit_code == 0
    assert retry_failed(cube, IngestConfig(), client=local_client).exit_code == 0


def test_adding_to_a_cube_opens_its_unfinished_files_only_where_todays_command_says(
    cube: Path, local_client: Any, tmp_path: Path, save: Any, make_item: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The typed source is the user's own, the plan of the cube is not."""
    forge(cube, monkeypatch, source="/catalog.json", config=dict(TRUSTING))
    (cube / "_terrashard/ledger" / NAME / "0-0-0.json").unlink()
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.move(save(make_item()), mine / "items.json")
    before = tree(cube)
    config = IngestConfig(bands=("red", "scl"), datetime="2020-01-01/2020-01-31")  # the source has nothing new then
    for append, refresh in ((True, False), (False, True)):
        with pytest.raises(InvalidInput, match=f"--allow-local {cube.parent}"):
            extend(str(mine / "items.json"), cube, config, append=append, refresh=refresh, client=local_client)
    assert tree(cube) == before
    wider = config.model_copy(update={"allow_local": (str(cube.parent),)})
    assert len(extend(str(mine / "items.json"), cube, wider, client=local_client).written) == 1


def test_a_plan_file_may_open_its_own_folder_and_no_other(cube: Path, tmp_path: Path) -> None:
    plan = replace(kept_plan(cube), source="/catalog.json")
    check_hrefs(plan, IngestConfig(), typed=str(cube.parent / "plan.json"))
    with pytest.raises(InvalidInput, match=f"--allow-local {cube.parent}"):
        check_hrefs(plan, IngestConfig(), typed=str(tmp_path / "elsewhere" / "plan.json"))


def test_scenes_of_a_provider_that_is_not_known_need_its_file(cube: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aim(cube, '"provider":"terrashard"', '"provider":"mine"', monkeypatch)
    plan = kept_plan(cube)
    with pytest.raises(InvalidInput, match="--provider-file FILE"):
        check_hrefs(plan, IngestConfig())
    with pytest.raises(InvalidInput, match="--provider-file FILE"):
        extend("catalog.json", cube, IngestConfig())
    with pytest.raises(InvalidInput, match="--provider-file FILE"):
        audit(cube, IngestConfig(), source="catalog.json")
    config = IngestConfig(bands=("red", "scl"), providers=(ProviderRule(name="mine"),))
    assert plan_extension(plan, str(cube.parent / "nothing"), config, append=True,
                          refresh=False, found=find_nothing()) is plan  # fmt: skip


def find_nothing() -> Any:
    from ingest.scenes.search import SearchResult

    return SearchResult(())


# ---- Buckets that cost money, and keys


class Nobody(urllib3.PoolManager):
    """Answers no request, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def request(self, method: str, url: str, *_: Any, **__: Any) -> Any:
        self.asked.append(url)
        raise urllib3.exceptions.HTTPError("nothing is asked here")


PAID = "s3://sentinel-s2-l2a/tiles/33/T/WM/2023/8/15/0/R10m/B04.jp2"


def test_an_item_that_looks_like_a_providers_gets_no_paid_bucket(
    server: Any, make_item: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "CANARY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY")
    item = make_item(earthsearch__boa_offset_applied=True)
    for asset in item["assets"].values():
        asset["href"] = PAID
    server.json("/items.json", {"type": "FeatureCollection", "features": [item]})
    with pytest.raises(InvalidInput, match="--allow-host sentinel-s2-l2a"):
        find_scenes(f"{server.url}/items.json", IngestConfig(bands=("red",), mask="none"))


def test_a_paid_bucket_is_read_by_a_flag_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "a"}
    monkeypatch.setattr(ingest.trust.buckets, "_regions", {"sentinel-s2-l2a": "eu-central-1"})
    nobody = Nobody()
    with pytest.raises(InvalidInput, match="--requester-pays"):
        bucket_url(PAID, Access().bucket_rules, nobody, keys)
    assert nobody.asked == []
    assert "x-amz-request-payer" in bucket_url(PAID, Access().bucket_rules, nobody, keys, pay=True)
    assert not Access.of(IngestConfig()).requester_pays
    assert Access.of(IngestConfig(requester_pays=True)).requester_pays
    from ingest.raster.access import with_asset

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a")
    with pytest.raises(AssetUnreadable, match="--requester-pays"):
        with_asset(PAID, lambda dataset: None, scene="S", asset="red", access=Access(attempts=1))


def test_whose_buckets_an_item_may_name_is_a_matter_of_the_source() -> None:
    item = {"properties": {"eopf:x": 1}, "assets": {}}
    rule = find_provider(item)
    assert rule.name == "cdse"
    own = "https://stac.dataspace.copernicus.eu/v1"
    assert "eodata" in trusted_hosts(rule, own)
    assert "eodata" in trusted_hosts(rule, "saved/items.json")
    assert "eodata" not in trusted_hosts(rule, "https://evil.example/stac")
    assert "eodata" not in trusted_hosts(rule, "https://stac.dataspace.copernicus.eu.evil.example/v1")
    mine = ProviderRule(name="mine", marks=("mine:",), hosts=("stac.mine.example", "box"), buckets=("box",))
    assert trusted_hosts(mine, "https://evil.example/stac", [mine]) == ("stac.mine.example",)
    assert trusted_hosts(mine, "https://stac.mine.example/v1", [mine]) == mine.hosts


@pytest.mark.parametrize(
    "href",
    [
        "http://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/a.tif",
        "http://archive.example/box/a.tif",
        "https://blob.core.windows.net.evil.example/box/a.tif",
        "https://evilblob.core.windows.net/box/a.tif",
    ],
)
def test_no_token_goes_to_another_host_or_unencrypted(href: str) -> None:
    rules = (SignRule("https://archive.example/token", ("archive.example",)),)
    nobody = Nobody()
    assert signed(href, "planetary-computer", nobody, rules=rules) == href
    assert nobody.asked == []


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer CANARY"}])
def test_no_credential_is_sent_over_http(headers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requests.Session.send", lambda *_, **__: pytest.fail("something was sent"))
    source = "http://stac.example/v1" if headers else "http://me:CANARY@stac.example/v1"
    with pytest.raises(InvalidInput, match="credentials are not sent over http") as caught:
        find_scenes(source, IngestConfig(), headers=headers)
    assert "CANARY" not in str(caught.value)
