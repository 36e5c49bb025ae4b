"""Hostile hrefs are refused before anything is opened, honest ones are resolved."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ingest.request.config import IngestConfig
from ingest.trust.hrefs import (
    HrefPolicy,
    is_private_address,
    refuse_private_address,
    resolve_href,
    same_origin,
)
from ingest.trust.redact import redact_logs, redact_text, redact_url, strip_signature
from zarr_store.errors import InvalidInput


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("64:ff9b::8.8.8.8", False), ("2002:808:808::", False), ("64:ff9b::127.0.0.1", True),
        ("64:ff9b:1::a00:1", True), ("2002:a00:1::", True), ("::127.0.0.1", True), ("::ffff:0:10.0.0.1", True),
        ("fec0::1", True), ("224.0.0.1", True), ("ff02::1", True),
        ("8.8.8.8", False), ("2001:4860:4860::8888", False), ("::ffff:8.8.8.8", False),
        ("10.0.0.1", True), ("::ffff:127.0.0.1", True), ("169.254.169.254", True), ("fe80::1", True),
        ("100.64.0.1", True), ("0.0.0.0", True), ("no address", True), ("", True),
    ],
)  # fmt: skip
def test_what_is_no_public_address_is_private(address: str, private: bool) -> None:
    """Also what is no address at all: what cannot be checked is not trusted."""
    assert is_private_address(address) is private


@pytest.mark.parametrize("host", ["a b.example", "a\u2028.example", "127.0.0.1;.example"])
def test_what_is_no_name_of_a_host_is_refused_whatever_is_allowed(host: str) -> None:
    policy = HrefPolicy.around("catalog.json", hosts=["*.example"])
    assert resolve_href("https://a-b.example/x", base="https://a.example/", policy=policy)
    with pytest.raises(InvalidInput, match="names no host"):
        resolve_href(f"https://{host}/x", base="https://a.example/", policy=policy)


API = "https://stac.example.org/v1"
HOSTILE = [
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "/vsicurl/https://stac.example.org/a.tif",
    "/VSIZIP//etc/x.zip",
    "vrt:///etc/passwd",
    "vrt://a.tif",
    "<VRTDataset></VRTDataset>",
    '{"type": "gti"}',
    "GTIFF_DIR:1:/etc/passwd",
    "MEM:::DATAPOINTER=1",
    "data:text/plain,hello",
    "NETCDF:a.nc:band",
    "s3://169.254.169.254/latest",
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1/a.tif",
    "http://localhost:8787/a.tif",
    "http://10.1.2.3/a.tif",
    "http://[::1]/a.tif",
    "http://[::ffff:127.0.0.1]/a.tif",
    "http://2130706433/a.tif",
    "http://0x7f.1/a.tif",
    "http://127.1/a.tif",
    "https://me:secret@stac.example.org/a.tif",
    "https://stac.example.org@evil.example/a.tif",
    "https://evil.example/a.tif",
    "https://stac.example.org/../../a.tif",
    "https://stac.example.org/%2e%2e/a.tif",
    "ftp://stac.example.org/a.tif",
    "gopher://stac.example.org/a",
    "//evil.example/a.tif",
    "\\\\server\\share\\a.tif",
    "a.tif\x00.png",
    "a\u202efit.tif",
    " a.tif",
    "",
    "x" * 5000,
    None,
    7,
    "https:///a.tif",
    "http://[bad/a.tif",
]


@pytest.mark.parametrize("href", HOSTILE)
def test_hostile_hrefs_are_refused_for_an_api(href: object) -> None:
    policy = IngestConfig().trust.href_policy(API)
    with pytest.raises(InvalidInput) as caught:
        resolve_href(href, base=API + "/item", policy=policy)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("href", HOSTILE)
def test_hostile_hrefs_are_refused_for_a_folder(href: object, tmp_path: Path) -> None:
    (tmp_path / "catalog.json").touch()
    policy = IngestConfig().trust.href_policy(str(tmp_path / "catalog.json"))
    with pytest.raises(InvalidInput):
        resolve_href(href, base=str(tmp_path / "item.json"), policy=policy)


def test_own_host_and_named_hosts_are_allowed() -> None:
    config = IngestConfig(allow_hosts=("data.example.net", "*.blob.example", "https://typed.example/x", "bucket"))
    policy = config.trust.href_policy(API, ["provider.example"])
    for href, expected in {
        "b02.tif": "https://stac.example.org/v1/items/b02.tif",
        "/root.tif": "https://stac.example.org/root.tif",
        "../up.tif": "https://stac.example.org/v1/up.tif",
        "HTTPS://STAC.example.org:443/a.tif#frag": "https://stac.example.org/a.tif",
        "https://data.example.net/a.tif?layer=1": "https://data.example.net/a.tif?layer=1",
        "https://x.blob.example/a.tif": "https://x.blob.example/a.tif",
        "https://typed.example/a.tif": "https://typed.example/a.tif",
        "https://provider.example/a.tif": "https://provider.example/a.tif",
        "s3://bucket/key/a.jp2": "s3://bucket/key/a.jp2",
    }.items():
        assert resolve_href(href, base="https://stac.example.org/v1/items/one.json", policy=policy) == expected
    with pytest.raises(InvalidInput, match=r"--allow-host blob\.example"):
        resolve_href("https://blob.example/a.tif", base=API, policy=policy)


def test_private_addresses_need_a_flag_or_a_private_source() -> None:
    inside = "http://10.1.2.3/a.tif"
    with pytest.raises(InvalidInput, match="--allow-private-hosts"):
        resolve_href(inside, base=API, policy=IngestConfig(allow_hosts=("10.1.2.3",)).trust.href_policy(API))
    policy = IngestConfig(allow_private_hosts=True).trust.href_policy(API)
    assert resolve_href(inside, base=API, policy=policy) == inside
    own = IngestConfig().trust.href_policy("http://127.0.0.1:8000/stac")
    assert resolve_href("http://127.0.0.1:8001/a.tif", base="http://127.0.0.1:8000/", policy=own).endswith(
        ":8001/a.tif"
    )
    with pytest.raises(InvalidInput):
        resolve_href("http://169.254.169.254/a", base="http://127.0.0.1:8000/", policy=own)


def test_local_files_stay_below_the_catalogue(tmp_path: Path) -> None:
    root = tmp_path / "cat"
    (root / "item").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (root / "link.tif").symlink_to(tmp_path / "elsewhere" / "b.tif")
    source, base = str(root / "catalog.json"), str(root / "item" / "item.json")
    policy = IngestConfig().trust.href_policy(source)
    assert resolve_href("b.tif", base=base, policy=policy) == str(root / "item" / "b.tif")
    assert resolve_href("../b.tif", base=base, policy=policy) == str(root / "b.tif")
    for href in ("../../elsewhere/b.tif", str(tmp_path / "elsewhere" / "b.tif"), "../link.tif", "/etc/passwd"):
        with pytest.raises(InvalidInput, match="--allow-local"):
            resolve_href(href, base=base, policy=policy)
    wider = IngestConfig(allow_local=(str(tmp_path / "elsewhere"),)).trust.href_policy(source)
    assert resolve_href("../link.tif", base=base, policy=wider) == str(tmp_path / "elsewhere" / "b.tif")
    # a catalogue from the network names no local file, whatever its folder
    with pytest.raises(InvalidInput, match="refused"):
        resolve_href(str(root / "b.tif"), base=str(root / "x"), policy=IngestConfig().trust.href_policy(API))


def test_a_name_that_leads_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ingest.trust import hrefs

    monkeypatch.setattr(hrefs, "_lookup", lambda host: ("93.184.216.34", "192.168.0.7"))
    with pytest.raises(InvalidInput, match=r"192\.168\.0\.7"):
        refuse_private_address("https://rebind.example/a.tif", IngestConfig().trust.href_policy(API))
    refuse_private_address("https://rebind.example/a", IngestConfig(allow_private_hosts=True).trust.href_policy(API))


def test_nothing_secret_is_shown_or_stored() -> None:
    assert redact_url("https://u:canary@h.example/a.tif?sig=canary#canary") == "https://h.example/a.tif"
    assert "canary" not in redact_text("open https://u:canary@h/a?x=canary failed: url: /v1/search?token=canary (x)")
    assert strip_signature("https://h/a.tif?sv=2024&sig=canary&layer=2") == "https://h/a.tif?layer=2"
    assert strip_signature("https://h/a?X-Amz-Signature=c&X-Amz-Date=d") == "https://h/a"


def test_origin_is_scheme_host_and_port() -> None:
    assert same_origin("https://a.example/x", "https://A.example:443/y")
    assert not same_origin("https://a.example", "http://a.example")
    assert not same_origin("http://127.0.0.1:1", "http://127.0.0.1:2")


def test_what_libraries_log_of_urls_is_redacted(caplog: pytest.LogCaptureFixture) -> None:
    redact_logs()
    redact_logs()
    with caplog.at_level("DEBUG"):
        log = logging.getLogger("urllib3.connectionpool")
        log.warning("Retrying (%r) after connection broken by '%r': %s", 1, "reset", "/a.tif?sig=canary")
        log.debug('%s://%s:%s "%s %s %s" %s %s', "http", "h", 80, "GET", "/a.tif?sig=canary", "HTTP/1.1", 200, 3)
        logging.getLogger("rasterio._env").error("CPLE: HTTP 403 on https://me:canary@host/a.tif?sig=canary")
    assert "canary" not in caplog.text
    assert caplog.text.count("/a.tif") == 3
    assert len(logging.getLogger("urllib3.connectionpool").filters) == 1
