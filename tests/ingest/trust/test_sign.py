"""Tokens: asked once a container, renewed on refusal, bound to their host, and in no message."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest

import ingest.trust.sign
from ingest.raster.limits import Access
from ingest.raster.read import read_on_grid
from ingest.request.config import IngestConfig
from ingest.scenes.scene import AssetRef
from ingest.testing import write_raster
from ingest.trust.providers import ProviderRule
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (40, 40))
QUICK = Access(attempts=2, backoff_s=0.01, low_speed_s=1, sign="planetary-computer")


@pytest.fixture
def storage(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A storage host that wants the token of the day, and the endpoint that gives it."""
    data = write_raster(tmp_path / "a.tif", GRID, np.full(GRID.shape, 7, np.uint16)).read_bytes()
    state: dict[str, Any] = {"token": "day1", "given": "day1", "asked": 0, "lifetime": 3600.0}

    def token(_: Any) -> Any:
        state["asked"] += 1
        expiry = datetime.fromtimestamp(time.time() + state["lifetime"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return 200, {}, {"token": f"sig={state['given']}", "msft:expiry": expiry}

    def file(request: Any) -> Any:
        if f"sig={state['token']}" not in request.path:
            return 403, {}, b"no"
        start, _, stop = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        body = data[int(start) : int(stop or len(data)) + 1]
        where = f"bytes {start}-{int(start) + len(body) - 1}/{len(data)}"
        return (206 if "Range" in request.headers else 200), {"Content-Range": where}, body

    server.answer["/token/127/box"] = token
    server.answer["/box/a.tif"] = file
    monkeypatch.setattr(ingest.trust.sign, "TOKEN_URL", f"{server.url}/token")
    monkeypatch.setattr(ingest.trust.sign, "STORAGE_HOSTS", "127.0.0.1")
    monkeypatch.setattr(ingest.trust.sign, "_tokens", {})
    state["asset"] = AssetRef(band="red", key="B04", href=f"{server.url}/box/a.tif", nodata=0)
    return state


def read(asset: AssetRef, access: Access = QUICK) -> np.ndarray:
    return read_on_grid(asset, GRID, GRID, "nearest", scene="S", access=access)


def test_a_token_is_asked_once_for_many_reads(storage: Any) -> None:
    for _ in range(3):
        assert (read(storage["asset"]) == 7).all()
    assert storage["asked"] == 1


def test_a_refused_token_is_renewed_once(storage: Any) -> None:
    read(storage["asset"])
    storage["token"] = storage["given"] = "day2"
    assert (read(storage["asset"]) == 7).all()
    assert storage["asked"] == 2


def test_an_expiring_token_is_not_used(storage: Any) -> None:
    storage["lifetime"] = 60.0
    read(storage["asset"])
    read(storage["asset"])
    assert storage["asked"] == 2


def test_a_token_that_never_fits_is_an_error_without_the_token(storage: Any) -> None:
    storage["token"] = "other"
    with pytest.raises(AssetUnreadable, match="HTTP 403") as caught:
        read(storage["asset"])
    assert "day1" not in str(caught.value)
    assert storage["asked"] == 2


def test_without_signing_no_token_is_asked(storage: Any) -> None:
    with pytest.raises(AssetUnreadable, match="HTTP 403"):
        read(storage["asset"], Access(attempts=1, low_speed_s=1))
    assert storage["asked"] == 0


def test_other_hosts_get_no_token(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest.trust.sign, "STORAGE_HOSTS", ".blob.core.windows.net")
    with pytest.raises(AssetUnreadable, match="HTTP 403"):
        read(storage["asset"])
    assert storage["asked"] == 0


def own(storage: Any, **changes: Any) -> Access:
    """The rules of a user's provider over the same endpoint, without --sign."""
    url = storage["asset"].href.rpartition("/box")[0]
    rule = {"name": "mine", "hosts": ("127.0.0.1",), "token_url": f"{url}/token", "token_margin_s": 0.2} | changes
    config = IngestConfig(providers=(ProviderRule.model_validate(rule),))
    return replace(Access.of(config), attempts=3, backoff_s=0.01, low_speed_s=1)


def expiring(storage: Any, server: Any, lifetime: float, ahead: float = 0.0) -> list[int]:
    """Let the storage take a token only until its time, by a clock that may be ahead; returns what it refused."""
    plain = server.answer["/box/a.tif"]
    refused: list[int] = []

    def token(_: Any) -> Any:
        storage["asked"] += 1
        until = time.time() + lifetime
        moment = datetime.fromtimestamp(until + ahead, UTC).isoformat()
        date = format_datetime(datetime.fromtimestamp(time.time() + ahead, UTC), usegmt=True)
        return 200, {"Date": date}, {"token": f"sig=day1&until={until}", "msft:expiry": moment}

    def file(request: Any) -> Any:
        until = float(parse_qs(request.path.partition("?")[2]).get("until", ["0"])[0])
        if time.time() > until:
            refused.append(1)
            return 403, {}, b"expired"
        return plain(request)

    server.answer["/token/127/box"], server.answer["/box/a.tif"] = token, file
    return refused


def test_r12_a_token_that_expires_in_the_run_is_asked_anew(storage: Any, server: Any) -> None:
    refused = expiring(storage, server, lifetime=1.0)
    access = own(storage)
    began = time.monotonic()
    reads = 0
    while time.monotonic() - began < 2.2:
        assert (read(storage["asset"], access) == 7).all()
        reads += 1
    assert storage["asked"] >= 2
    assert reads > storage["asked"]  # kept as long as it holds
    assert len(refused) <= storage["asked"]


def test_r12_a_token_that_is_refused_early_is_renewed_before_a_read_fails(storage: Any, server: Any) -> None:
    refused = expiring(storage, server, lifetime=0.3)
    access = own(storage, token_margin_s=0.0)
    read(storage["asset"], access)
    held = next(iter(ingest.trust.sign._tokens))
    ingest.trust.sign._tokens[held] = replace(
        ingest.trust.sign._tokens[held], until=time.time() + 3600
    )  # it trusts the clock
    time.sleep(0.4)
    assert (read(storage["asset"], access) == 7).all()
    assert refused
    assert storage["asked"] == 2


@pytest.mark.parametrize("ahead", [-7200.0, 7200.0])
def test_r13_a_clock_that_is_wrong_is_said_and_harms_nothing(
    storage: Any, server: Any, ahead: float, caplog: pytest.LogCaptureFixture
) -> None:
    expiring(storage, server, lifetime=600.0, ahead=ahead)
    access = own(storage)
    with caplog.at_level("WARNING"):
        for _ in range(3):
            assert (read(storage["asset"], access) == 7).all()
    assert storage["asked"] == 1  # without the Date header it would look expired each time
    assert "clock" in caplog.text
    assert "day1" not in caplog.text


def test_a_provider_of_ones_own_signs_its_own_hosts_only(storage: Any) -> None:
    with pytest.raises(AssetUnreadable, match="HTTP 403"):
        read(storage["asset"], own(storage, token_hosts=("elsewhere.example",)))
    assert storage["asked"] == 0
    assert (read(storage["asset"], own(storage)) == 7).all()
    assert storage["asked"] == 1
