"""Fixtures of a plugin: an S3 server on this machine, an empty bucket on it, and a user's environment.

A test module has them by `pytest_plugins = ["tests.object_store"]`.
"""

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from queue import Empty, Queue
from urllib.request import Request, urlopen

import boto3
import pytest

START_LIMIT_S = 60


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """HOST:PORT of an S3 server.

    It is a process of its own: moto imports Flask, and vLLM, which looks at every attribute of every imported module
    when it makes an engine, fails on Flask's request-bound ones.
    """
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines: Queue[str] = Queue()

    def drain() -> None:
        for line in process.stderr or ():
            lines.put(line)

    threading.Thread(target=drain, daemon=True).start()
    told = ""
    try:
        while not (address := re.search(r"Running on http://(127\.0\.0\.1:\d+)", told)):
            try:
                told += lines.get(timeout=START_LIMIT_S)
            except Empty:
                pytest.fail(f"the S3 server did not start within {START_LIMIT_S} s: {told}")
        yield address[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def check_keys(s3_server: str) -> Iterator[Callable[[], None]]:
    """A call from which on, to the end of the test, the server looks at keys."""

    def unsigned(actions: str) -> None:
        address = f"http://{s3_server}/moto-api/reset-auth"
        request = Request(address, data=actions.encode(), headers={"Content-Type": "text/plain"}, method="POST")
        urlopen(request, timeout=START_LIMIT_S).close()

    yield lambda: unsigned("0")
    unsigned("inf")


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
def store(s3_server, keys):
    """A client of the server, which has an empty bucket named bucket."""
    s3 = boto3.client("s3", endpoint_url=f"http://{s3_server}", region_name="us-east-1")
    s3.create_bucket(Bucket="bucket")
    yield s3
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
        for entry in page.get("Contents", []):
            s3.delete_object(Bucket="bucket", Key=entry["Key"])
    s3.delete_bucket(Bucket="bucket")


@pytest.fixture
def query(s3_server):
    """The options that make an address one of the server."""
    return f"?scheme=http&region=us-east-1&endpoint_override={s3_server}"


@pytest.fixture
def keys_in(store):
    """The names of all objects below a prefix, in order, without the marks of empty directories."""

    def names(prefix: str = "") -> list[str]:
        pages = store.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [name for name in found if not name.endswith("/")]

    return names
