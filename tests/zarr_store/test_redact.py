"""No shape of a secret passes the redactor, and what is no secret passes it unchanged."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zarr_store.redact import redact_text, redact_url, redact_value, strip_signature

from .secret_shapes import CANARY, SHAPES

# letters and marks that passwords have and that people forget to encode; a blank ends every address
ODD = st.text("abcXYZ019!$&'()*+,;=:%~_-.@\"<>[]{}|^/?#`", max_size=12)
PLAIN = st.text("abcXYZ019+=_-.~%", max_size=8)
BEFORE = st.sampled_from(["", "cannot read ", "[", "(see ", '{"url": "', "two\nlines: ", "'", "GET ", "a: ", "<", "x,"])
AFTER = st.sampled_from(["", " failed", "]", ") (Caused by 3)", '"}', "\nnext line", "'", ".", ": HTTP 403", ">", ","])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@settings(max_examples=60, deadline=None)
@given(before=BEFORE, after=AFTER, head=PLAIN, tail=PLAIN)
@example(before="", after="", head="", tail="")
def test_no_shape_of_a_secret_passes(shape: str, before: str, after: str, head: str, tail: str) -> None:
    text = before + shape.format(f"{head}{CANARY}{tail}") + after
    made = redact_text(text)
    assert CANARY not in made, made
    assert redact_text(made) == made  # a text may pass several doors
    assert CANARY not in json.dumps(redact_value({"a": [text], "b": text}))
    assert CANARY not in redact_text(repr(text))
    assert CANARY not in redact_text(json.dumps({"error": text}))


@settings(max_examples=400, deadline=None)
@given(before=BEFORE, after=AFTER, head=ODD, tail=ODD, host=st.sampled_from(["h", "h.example:8080", "[::1]:9"]))
@example(before='{"url": "', after='"}', head="p'w\"", tail="/x?y#z", host="h")
def test_a_password_with_odd_characters_does_not_pass(before: str, after: str, head: str, tail: str, host: str) -> None:
    text = f"{before}https://me:a{head}{CANARY}{tail}@{host}/a.tif?b=c{after}"
    made = redact_text(text)
    assert CANARY not in made, made
    assert CANARY not in redact_url(f"https://me:a{head}{CANARY}{tail}@{host}/a.tif")
    assert CANARY not in redact_text(f"https://me:{quote(head + CANARY + tail, safe='')}@{host}/a")


@pytest.mark.parametrize(
    "text",
    [
        "unknown band 'bleu': did you mean 'blue'? (known: blue, red)",
        "scene S2A_33TWM, asset B02 (https://host.example:8080/a/b.tif) could not be read: HTTP 404 Not Found",
        "scheduler tcp://127.0.0.1:8786 and tcp://HOST:PORT or s3://bucket/key",
        "shard-sentinel-2-l2a-0-1-2-ab12cd34: design=4 key=shard-a-1 (is it right? yes)",
        "Basic information about the tokens of a model",
        "expected https, as secrets go there",
        'GEOGCS["WGS 84",AUTHORITY["EPSG","4326"]]',
        "/data/é/中/a.tif: No such file or directory",
        "https://host/@2x/a.tif",
        '["https://a.example/x","https://b.example:80","me@c.example"]',
        "token: None; password=null",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text
    assert redact_value({"text": [text, 1, None, 2.5]}) == {"text": [text, 1, None, 2.5]}


def test_addresses_that_are_opened_again_keep_what_is_no_credential() -> None:
    href = f"https://me:{CANARY}@h/a.tif?layer=2&sig={CANARY}&subscription-key={CANARY}"
    assert redact_value([href, "s3://b/k"]) == ["https://h/a.tif?layer=2", "s3://b/k"]
    assert strip_signature("https://h/a?AWSAccessKeyId=a&Expires=1&Signature=b&x=1") == "https://h/a?x=1"
    assert redact_url(f"https://u:{CANARY}@h.example/a.tif?sig={CANARY}#{CANARY}") == "https://h.example/a.tif"
    assert redact_url("a.tif?sig=1") == "a.tif"


def test_values_of_secrets_in_the_environment_are_hidden_without_any_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "CDSE_S3_SECRET_ACCESS_KEY", "PC_SDK_SUBSCRIPTION_KEY", "AZURE_STORAGE_KEY"):
        monkeypatch.setenv(name, f"{CANARY}/{name}")
        assert CANARY not in redact_text(f"the server says that {CANARY}/{name} is not known")
    monkeypatch.setenv("SOME_TOKEN", "x")
    assert redact_text("x is short") == "x is short"


def test_long_texts_are_redacted_in_bounded_time() -> None:
    from time import monotonic

    for part in ("a", "/", "a://", "?", "token", '"', "\\", "https://me:", "=", "eyJ.", "<token "):
        begun = monotonic()
        redact_text(part * (200_000 // len(part)))
        assert monotonic() - begun < 10, part
