"""Where files are: local paths and object stores (s3://, gs://) behind one pyarrow.fs interface."""

import os
import uuid
from collections.abc import Callable
from typing import IO, Any

from pyarrow import fs

from corpus.problems import RunProblem, UsageProblem

OBJECT_STORES = ("s3://", "gs://", "gcs://")

GCS_RETRY_SECONDS = 30
"""How long an unreachable gs:// address is tried again; the client's own 15 minutes look like a hang. House default;
an address overrides it with ?retry_limit_seconds=…."""


def is_object_store(path: str | os.PathLike[str]) -> bool:
    """True for an address in an object store, False for a path on this machine."""
    return str(path).startswith(OBJECT_STORES)


def resolve(path: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """The file system that holds `path`, and the path inside it. Local paths become absolute; ~ is expanded.

    Raises UsageProblem where the address cannot be understood or its store cannot be set up.
    """
    text = str(path)
    if "\0" in text:
        raise UsageProblem(f"{text!r}: no path or address holds a NUL character.")
    if is_object_store(text):
        try:
            return fs.FileSystem.from_uri(_bounded(text))
        except (OSError, ValueError) as error:
            raise UsageProblem(f"{text}: this storage address cannot be opened ({one_line(error)}).") from error
    if "://" in text:
        raise UsageProblem(f"{text}: this kind of address is not known; give a local path, s3://… or gs://….")
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))


def _bounded(address: str) -> str:
    """The address with a limit to its retries; S3's client has short ones of its own."""
    if address.startswith("s3://") or "retry_limit_seconds=" in address:
        return address
    return f"{address}{'&' if '?' in address else '?'}retry_limit_seconds={GCS_RETRY_SECONDS}"


def one_line(error: BaseException) -> str:
    """What the error says, as one line of at most 300 characters: clients of object stores write whole dumps."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes] | Any], None]) -> None:
    """Calls `write(stream)` and makes the result appear at `path` whole or not at all.

    Locally: a temporary file beside it, fsync, rename. In an object store: one upload, which becomes visible when it
    is complete. Parent directories are made. Raises RunProblem where the disk is full or refuses.
    """
    filesystem, inner = resolve(path)
    if is_object_store(path):
        try:
            with filesystem.open_output_stream(inner) as stream:
                write(stream)
        except OSError as error:
            raise RunProblem(f"{path}: could not be written ({error}).") from error
        return
    temporary = f"{inner}.{uuid.uuid4().hex[:8]}.partial"
    try:
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, inner)
    except OSError as error:
        raise RunProblem(f"{path}: could not be written ({error}).") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
