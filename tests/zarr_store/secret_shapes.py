"""Every shape in which a secret comes along, for the tests of the redactor and of all that passes through it."""

from __future__ import annotations

from pathlib import Path

CANARY = "canary-7f3a"
"""Stands in the place of the secret."""

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

TEXTS = {name: f"cannot read it: {shape.format(f'x9{CANARY}')}" for name, shape in SHAPES.items()}
"""Messages that hold the canary in every shape."""


def assert_nowhere(printed: str, *places: Path) -> int:
    """The canary is neither in what was printed nor in any file below `places`; returns how many files there are."""
    at = printed.find(CANARY)
    assert at < 0, printed[max(0, at - 300) : at + 100]
    files = [path for place in places for path in sorted(place.rglob("*")) if path.is_file()]
    for path in files:
        data = path.read_bytes()
        at = data.find(CANARY.encode())
        assert at < 0, (path, data[max(0, at - 300) : at + 100])
    return len(files)
