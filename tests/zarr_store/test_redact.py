"""No shape of a secret passes the redactor, and what is no secret passes it unchanged."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zarr_store.redact import redact_text, redact_url, redact_value, strip_signature

CANARY = "canary-7f3a"
# letters and marks that passwords have and that people forget to encode; a blank ends every address
ODD = st.text("abcXYZ019!$&'()*+,;=:%~_-.@\"<>[]{}|^/?#`", max_size=12)
PLAIN = st.text("abcXYZ019+=_-.~%", max_size=8)
BEFORE = st.sampled_from(["", "cannot read ", "[", "(see ", '{"url": "', "two\nlines: ", "'", "GET ", "a: ", "<", "x,"])
AFTER = st.sampled_from(["", " failed", "]", ") (Caused by 3)", '"}', "\nnext line", "'", ".", ": HTTP 403", ">", ","])

SHAPES = {
    "azure": "https://a.blob.core.windows.net/c/x.tif?sv=2024-01-01&se=2024&sig={}&sp=r",
    "sigv4": "https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4&X-Amz-Credential={0}%2F2024&X-Amz-Signature={0}",
    "session token": "https://h/k?x=1&X-Amz-Security-Token={}",
    "brackets in a query": "https://h/a?filter=(a,[b])&token={}",
    "fragment": "https://h/a#access_token={}",
    "user": "https://me:{}@host.example/a.tif",
    "user alone": "s3://{}@bucket/a.tif",
    "vsicurl": "/vsicurl/https://me:{0}@h/a.tif?sig={0}",
    "vsicurl with options": "/vsicurl?use_head=no&url=https%3A%2F%2Fh%2Fa.tif%3Fsig%3D{}",
    "encoded": "https%3A%2F%2Fme%3A{0}%40h%2Fa.tif%3Fsig%3D{0}",
    "encoded twice": "next=https%253A%252F%252Fme%253A{0}%2540h%252Fa%253Fsig%253D{0}",
    "path": "Max retries exceeded with url: /c/x.tif?sig={} (Caused by 3)",
    "bare query": "/c/x.tif?{}",
    "relative": "x.tif?sig={}",
    "environment": "AWS_SECRET_ACCESS_KEY={} AWS_REGION=x",
    "exported": "export AZURE_STORAGE_SAS_TOKEN='{}'",
    "bearer": "Authorization: Bearer {}",
    "basic": "authorization: Basic {}==",
    "bearer alone": "sent Bearer {} to it",
    "sigv4 header": "Authorization: AWS4-HMAC-SHA256 Credential=AKIA/{0}, SignedHeaders=host, Signature={0}",
    "curl": "-H 'Authorization: Bearer {}' https://h",
    "header": "Ocp-Apim-Subscription-Key: {}",
    "cookie": "Cookie: a=1; session={}",
    "set-cookie": "Set-Cookie: id={}; HttpOnly",
    "json": '{{"detail": "no", "token": "{}", "n": 1}}',
    "compact json": '{{"access_token":"{}","token_type":"x"}}',
    "json in json": '{{"body": "{{\\"token\\": \\"{}\\"}}"}}',
    "several lines": '{{\n  "clientSecret":\n    "{}"\n}}',
    "dict": "{{'password': '{}', 'user': 'me'}}",
    "bytes": "{{b'x-api-key': b'{}'}}",
    "headers": "HTTPHeaderDict({{'Authorization': 'Bearer {}', 'Accept': '*/*'}})",
    "pairs": "[('Authorization', 'Bearer {}'), ('Accept', '*/*')]",
    "dataclass": "SignRule(token='{}', hosts=())",
    "connection string": "DefaultEndpointsProtocol=https;AccountName=n;AccountKey={};EndpointSuffix=core.windows.net",
    "shared access": "BlobEndpoint=https://h;SharedAccessSignature=sv=1&sig={}",
    "xml": "<Error><AWSAccessKeyId>{0}</AWSAccessKeyId><SignatureProvided>{0}</SignatureProvided></Error>",
    "google": "GoogleAccessId=me&Signature={}",
    "hmac": "hmac = {}",
    "yaml": "secret_key: {}",
    "pem": "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----",
    "jwt": "got eyJhbGciOiJIUzI1NiJ9.{} back",
}  # fmt: skip


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
