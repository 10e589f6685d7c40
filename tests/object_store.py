"""Fixtures of a plugin: an S3 server on this machine, an empty bucket on it, and a user's environment.

A test module has them by `pytest_plugins = ["tests.object_store"]`.
"""

import boto3
import pytest
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="session")
def server():
    """HOST:PORT of an S3 server."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def keys(monkeypatch):
    """Some keys in the environment, as a user has them, and no other way to find any."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush/hush")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def store(server, keys):
    """A client of the server, which has an empty bucket named bucket."""
    s3 = boto3.client("s3", endpoint_url=f"http://{server}", region_name="us-east-1")
    s3.create_bucket(Bucket="bucket")
    yield s3
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
        for entry in page.get("Contents", []):
            s3.delete_object(Bucket="bucket", Key=entry["Key"])
    s3.delete_bucket(Bucket="bucket")


@pytest.fixture
def query(server):
    """The options that make an address one of the server."""
    return f"?scheme=http&region=us-east-1&endpoint_override={server}"


@pytest.fixture
def keys_in(store):
    """The names of all objects below a prefix, in order, without the marks of empty directories."""

    def names(prefix: str = "") -> list[str]:
        pages = store.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [name for name in found if not name.endswith("/")]

    return names
