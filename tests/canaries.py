"""Secrets that are planted to be looked for, and the search: in every byte of a directory, as they are or as programs
write them."""

import base64
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, quote_plus

import pyarrow.parquet as pq

SECRET = "zq7/canary+4b1f=5e0d"
"""In most of them: with letters that URLs and JSON write otherwise."""

CANARIES = {
    "HF_TOKEN": "hf_zq7canaryQ4b1fXw9Lm2Nv",
    "AWS_ACCESS_KEY_ID": "AKIAZQ7CANARY4B1F5E0",
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}/aws/secret/key/of/forty",
    "AWS_SESSION_TOKEN": f"{SECRET}/aws/session",
    "REWARD_TOKEN": f"{SECRET}/reward",
    "AMENABLE_TOKEN": "amn_0123456789ab_zq7canary4b1f5e0dzq7canary4b1f5e0dzq7canary",
    "WANDB_API_KEY": f"{SECRET}/wandb",
    "AWS_ENDPOINT_URL": f"http://ann:{quote(SECRET, safe='')}@127.0.0.1:9",
}
"""Environment variables: of the Hub, of object stores, of a reward service, of a service's user, of a tracker, and an
address of a store with a password."""

_LOST = {0: 0, 1: 2, 2: 3}
"""Letters of base64 that what stands before a text has a part in, by the bytes of it modulo 3."""


def forms(secret: str) -> dict[str, bytes]:
    """`secret` as files may have it, by the name of the form, each once. Base64 has three, by where in a text it
    stands."""
    raw = secret.encode()
    found = {
        "as it is": raw,
        "in a URL": quote(secret, safe="").encode(),
        "in a form": quote_plus(secret).encode(),
        "in JSON": json.dumps(secret)[1:-1].encode(),
        "in hexadecimal": raw.hex().encode(),
        "in UTF-16": secret.encode("utf-16-le"),
    }
    for before in range(3):
        for kind, encode in (("base64", base64.b64encode), ("base64 of URLs", base64.urlsafe_b64encode)):
            whole = len(raw) - (before + len(raw)) % 3  # what stands behind it has a part in the rest
            found[f"in {kind}, {before} behind"] = encode(b"\0" * before + raw[:whole])[_LOST[before] :]
    return {form: written for written, form in {written: form for form, written in reversed(found.items())}.items()}


def found_in(content: bytes, canaries: Mapping[str, str] = CANARIES) -> list[str]:
    """Which canaries are in `content`, and as what: "HF_TOKEN as it is"."""
    return [
        f"{name} {form}"
        for name, secret in canaries.items()
        for form, written in forms(secret).items()
        if written in content
    ]


def search(directory: Path, canaries: Mapping[str, str] = CANARIES) -> list[str]:
    """Every canary in a file below `directory`, or in a file's name: "PATH: HF_TOKEN as it is"."""
    found = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file():
            contents = [name.encode(), *_contents(path)]
            found += [f"{name}: {one}" for one in sorted({each for c in contents for each in found_in(c, canaries)})]
    return found


def _contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and those that it holds compressed."""
    content = path.read_bytes()
    yield content
    if path.suffix == ".gz":
        yield gzip.decompress(content)
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield repr((table.schema.metadata, table.column_names)).encode()
        for column in table.columns:
            for chunk in column.chunks:
                for buffer in chunk.buffers():
                    if buffer is not None:
                        yield bytes(buffer)
