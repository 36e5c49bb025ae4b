"""A cube in a bucket, against a server of this machine that checks conditions and signatures' presence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

from zarr_store import CubeLock, CubeSpec, ShardWriter, SourceOutcome, create_cube, open_cube, verify_cube
from zarr_store.backends import open_store
from zarr_store.crash import EXIT_CODE
from zarr_store.errors import AccessError, CubeMismatch, InvalidInput, Locked, MissingShard, NotACube
from zarr_store.lock import LOCK_KEY
from zarr_store.objects import ObjectStore

NAME = "sentinel-2-l2a"
ITEMS = {NAME: [{"id": "A", "datetime": "2023-08-10T09:57:57Z"}, {"id": "B", "datetime": "2023-08-13T10:07:53Z"}]}
SECRET = "canary+of/the/secret"
BUCKET = "cubes"


def contents(client: Any) -> dict[str, bytes]:
    found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {entry["Key"]: client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read() for entry in found}


def cut(pixels: dict[str, np.ndarray], region: Any) -> dict[str, np.ndarray]:
    t, y, x = region.slices
    return {k: v[t, :, y, x] if v.ndim == 4 else v[t, y, x] for k, v in pixels.items()}


def fill(url: str, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    create_cube(url, [spec], items=ITEMS, provenance={"made": "by a test"})
    writer = ShardWriter(url, NAME)
    for region in spec.shards().values():
        writer.write(region, cut(pixels, region), key="k1", sources=[SourceOutcome(0, "A", "read")])


def test_bytes_go_in_and_out(bucket: Any) -> None:
    store = open_store(f"s3://{BUCKET}/a/b c/")
    assert isinstance(store, ObjectStore)
    assert store.url == f"s3://{BUCKET}/a/b c"
    assert not store.exists()
    store.write("x/2.json", b"two")
    store.write("x/1.json", b"one")
    store.write("x/deeper/3.json", b"three")
    assert store.list("x", ".json") == ["x/1.json", "x/2.json"]
    assert store.read_many(["x/2.json", "x/none", "x/1.json"]) == [b"two", None, b"one"]
    assert store.exists()
    store.delete("x/2.json")
    store.delete("x/2.json")
    assert sorted(contents(bucket)) == ["a/b c/x/1.json", "a/b c/x/deeper/3.json"]


def test_conditions_hold(bucket: Any) -> None:
    store = open_store(f"s3://{BUCKET}/c")
    assert store.create_exclusive("k", b"1")
    assert not store.create_exclusive("k", b"2")
    assert store.create_exclusive("k", b"1"), "a put sent twice, as after a lost answer, is the same put"
    assert not store.take("k", b"other", b"3")
    assert store.take("k", b"1", b"3")
    assert not store.take("absent", b"1", b"3")
    assert store.read("k") == b"3"


def test_of_two_that_take_over_one_wins(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's put comes between look and put: only If-Match can notice."""
    import obstore

    store = open_store(f"s3://{BUCKET}/c")
    store.write("k", b"stale")
    put = obstore.put
    fired: list[str] = []

    def late(client: Any, key: str, data: bytes, **how: Any) -> Any:
        if not fired:
            fired.append(key)
            bucket.put_object(Bucket=BUCKET, Key="c/k", Body=b"the other's")
        return put(client, key, data, **how)

    monkeypatch.setattr(obstore, "put", late)
    assert not store.take("k", b"stale", b"mine")
    assert fired
    assert store.read("k") == b"the other's"


def test_a_whole_cube_equals_the_one_in_a_folder(
    bucket: Any, spec: CubeSpec, pixels: dict[str, np.ndarray], cube_path: Path
) -> None:
    url = f"s3://{BUCKET}/some/cube.zarr"
    fill(url, spec, pixels)
    here = {str(p.relative_to(cube_path)): p.read_bytes() for p in cube_path.rglob("*") if p.is_file()}
    there = {key.removeprefix("some/cube.zarr/"): data for key, data in contents(bucket).items()}
    assert there == here
    cube = open_cube(url)
    for name, expected in pixels.items():
        for region in spec.shards().values():
            np.testing.assert_array_equal(cube.read(NAME, name, region), cut({name: expected}, region)[name])
    np.testing.assert_array_equal(cube.dataset(NAME)["reflectance"].to_numpy(), pixels["reflectance"])
    assert len(cube.ledger(NAME).rows()) == len(spec.shards())
    assert verify_cube(url).damage == ()
    assert not any(SECRET.encode() in data or b"AKIDCANARY" in data for data in there.values())
    assert SECRET not in json.dumps(open_store(url).tensorstore("x")) + repr(open_store(url))


def test_damage_and_loss_are_named(bucket: Any, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    url = f"s3://{BUCKET}/cube"
    fill(url, spec, pixels)
    bucket.delete_object(Bucket=BUCKET, Key=f"cube/{NAME}/status/c/0/0/0")
    key = f"cube/{NAME}/scl/c/0/0/1"
    bucket.put_object(Bucket=BUCKET, Key=key, Body=b"x" + contents(bucket)[key][1:])
    assert [(d.array, d.state, d.path) for d in verify_cube(url).damage] == [
        ("status", "missing", f"s3://{BUCKET}/cube/{NAME}/status/c/0/0/0"),
        ("scl", "corrupt", f"s3://{BUCKET}/{key}"),
    ]
    with pytest.raises(MissingShard, match=f"s3://{BUCKET}/cube"):
        open_cube(url).read(NAME, "status", spec.shards()[0, 0, 0])


CREATE = """
import json, sys
from zarr_store import CubeSpec, create_cube
asked = json.load(sys.stdin)
create_cube(sys.argv[1], [CubeSpec.from_dict(asked["spec"])], items=asked["items"], provenance={"made": "by a test"})
"""


@pytest.mark.parametrize("at", [1, 2, 3, 12, "last"])
def test_a_creation_that_dies_leaves_no_cube_and_can_be_repeated(
    bucket: Any, spec: CubeSpec, at: int | str, crash_points: int
) -> None:
    url = f"s3://{BUCKET}/cube"
    number = crash_points - 1 if at == "last" else at  # the last place is after the root, where the cube is there
    done = create_in_another_process(url, spec, crash_at=int(number))
    assert done.returncode == EXIT_CODE, done.stderr
    with pytest.raises(NotACube):
        open_cube(url)
    if at != 1:
        other = CubeSpec.from_dict(spec.to_dict() | {"times": list(spec.times[:1])})
        with pytest.raises(CubeMismatch, match="begun here and not completed"):
            create_cube(url, [other], items=ITEMS, provenance={})
    create_cube(url, [spec], items=ITEMS, provenance={"made": "by a test"})
    assert open_cube(url).spec(NAME) == spec
    create_cube(url, [spec], items=ITEMS, provenance={"made": "by a test"})
    assert "cube/_terrashard/begun" not in contents(bucket)


def create_in_another_process(url: str, spec: CubeSpec, crash_at: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CREATE, url],
        input=json.dumps({"spec": spec.to_dict(), "items": ITEMS}),
        env=os.environ | {"TERRASHARD_CRASH_AT": str(crash_at)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def crash_points(bucket: Any, spec: CubeSpec) -> int:
    """How many places a creation passes."""
    from zarr_store.crash import arm, reached

    arm(1 << 30)
    try:
        create_cube(f"s3://{BUCKET}/counted", [spec], items=ITEMS, provenance={"made": "by a test"})
        assert reached()[-1] == "after creating zarr.json"
        return len(reached())
    finally:
        arm(0)


def test_something_else_in_the_place_is_left_alone(bucket: Any, spec: CubeSpec) -> None:
    bucket.put_object(Bucket=BUCKET, Key="cube/photo.jpg", Body=b"mine")
    with pytest.raises(InvalidInput, match="is not a terrashard cube; nothing was changed"):
        create_cube(f"s3://{BUCKET}/cube", [spec], items=ITEMS, provenance={})
    assert contents(bucket) == {"cube/photo.jpg": b"mine"}


def test_two_runs_and_a_dead_one(bucket: Any) -> None:
    url = f"s3://{BUCKET}/cube"
    with CubeLock(url, "ingest"):
        with pytest.raises(Locked, match=r"held by ingest \(host .*, pid \d+.*remove s3://cubes/cube"):
            CubeLock(url, "append").__enter__()
        held = json.loads(contents(bucket)[f"cube/{LOCK_KEY}"])
    assert contents(bucket) == {}
    dead = json.dumps(held | {"boot": "another boot"}).encode()
    bucket.put_object(Bucket=BUCKET, Key=f"cube/{LOCK_KEY}", Body=dead)
    with CubeLock(url, "ingest") as lock:
        assert lock.took_over
        assert json.loads(contents(bucket)[f"cube/{LOCK_KEY}"])["token"] == lock.token
    assert contents(bucket) == {}


@pytest.mark.parametrize(
    "url", ["s3://user:hunter2@bucket/cube", "s3://bucket/cube?token=hunter2", "s3:///cube", "s3://bucket/c#hunter2"]
)
def test_urls_hold_no_credentials(url: str) -> None:
    with pytest.raises(InvalidInput, match="expected s3://bucket/prefix") as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


def test_google_goes_through_the_same_door() -> None:
    from zarr_store import backends

    assert "gs" in backends.OBJECT_SCHEMES
    store = ObjectStore("gs", "bucket", "p", None)
    assert store.tensorstore("a/b") == {"driver": "gcs", "bucket": "bucket", "path": "p/a/b/"}


def test_azure_goes_through_the_same_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    store = open_store("az://container/a/cube")
    assert isinstance(store, ObjectStore)
    assert (store.url, store.bucket, store.prefix) == ("az://container/a/cube", "container", "a/cube")
    with pytest.raises(InvalidInput, match=r"no driver for az://.*sample stores cannot"):
        store.tensorstore("image")
    with pytest.raises(InvalidInput, match="for Azure give az://container/prefix"):
        open_store("abfs://container@account.dfs.core.windows.net/cube")


def test_what_tensorstore_has_no_driver_for_is_read_all_the_same(
    bucket: Any, spec: CubeSpec, pixels: dict[str, np.ndarray]
) -> None:
    fill(f"s3://{BUCKET}/cube", spec, pixels)
    store = open_store(f"s3://{BUCKET}/cube")
    assert isinstance(store, ObjectStore)
    lost = f"{NAME}/status/c/0/0/0"
    bucket.delete_object(Bucket=BUCKET, Key=f"cube/{lost}")
    damaged = f"cube/{NAME}/scl/c/0/0/1"
    bucket.put_object(Bucket=BUCKET, Key=damaged, Body=b"x" + contents(bucket)[damaged][1:])
    # the scheme alone decides how pixels are read
    other = ObjectStore("az", store.bucket, store.prefix, store._client)
    read = {name: other.open_array(f"{NAME}/{name}", ts.Context()) for name in pixels}
    np.testing.assert_array_equal(read["reflectance"].read().result(), pixels["reflectance"])
    np.testing.assert_array_equal(
        read["source_item"][1, 3:29, 30:41].read().result(), pixels["source_item"][1, 3:29, 30:41]
    )
    with pytest.raises(ValueError, match=f"NOT_FOUND: {lost}"):
        read["status"].read().result()
    with pytest.raises(ValueError, match=f"DATA_LOSS: {damaged.removeprefix('cube/')}"):
        read["scl"].read().result()


def test_no_bucket_and_no_server_are_access_errors(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, spec: CubeSpec
) -> None:
    with pytest.raises(AccessError, match="there is no bucket elsewhere; create it first"):
        open_cube("s3://elsewhere/cube")
    monkeypatch.setattr("zarr_store.objects._RETRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(AccessError, match="check endpoint, region and network") as caught:
        open_cube(f"s3://{BUCKET}/cube")
    assert caught.value.exit_code == 8
    assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_answers_that_quote_the_secret_are_redacted(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    fired: list[Callable[..., Any]] = []

    def refuse(*args: Any, **how: Any) -> Any:
        fired.append(refuse)
        raise PermissionError(f"denied with {SECRET} of AKIDCANARY")

    monkeypatch.setattr(obstore, "put", refuse)
    with pytest.raises(AccessError, match="check the credentials and their rights") as caught:
        open_store(f"s3://{BUCKET}/cube").write("k", b"1")
    assert fired
    assert SECRET not in str(caught.value)
    assert "AKIDCANARY" not in str(caught.value)
