"""Where files are: local paths and object stores (s3://, gs://) behind one pyarrow.fs interface."""

import hashlib
import io
import os
import re
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from pyarrow import fs

from corpus.problems import RunProblem, UsageProblem

OBJECT_STORES = ("s3://", "gs://", "gcs://")

GCS_RETRY_SECONDS = 30
"""How long an unreachable gs:// address is tried again; the client's own 15 minutes look like a hang. House default;
an address overrides it with ?retry_limit_seconds=…."""

_BLOCK_BYTES = 1 << 20

_BUCKET_FIRST = re.compile(r"(anonymous@)?[^@:/]*(/|$)")


def is_object_store(path: str | os.PathLike[str]) -> bool:
    """True for an address in an object store, False for a path on this machine."""
    return str(path).startswith(OBJECT_STORES)


def resolve(path: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """The file system that holds `path`, and the path inside it. Local paths become absolute; ~ is expanded.

    Raises UsageProblem where the address cannot be understood or its store cannot be set up.
    """
    text = str(path)
    if "\0" in text:
        raise UsageProblem(f"{text!r}: no path or address holds a NUL character.", "storage/address")
    if is_object_store(text):
        return _object_store(text)
    if "://" in text:
        raise UsageProblem(
            f"{_masked(text)}: this kind of address is not known; give a local path, s3://… or gs://….",
            "storage/address",
        )
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))


def named(address: str | os.PathLike[str], inner: str) -> str:
    """What errors call the file `inner` of the file system of `address`: a path, or an address as a person reads it,
    without its options and with blanks as blanks."""
    text = str(address)
    return f"{text.partition('://')[0]}://{inner}" if is_object_store(text) else inner


def below(address: str | os.PathLike[str], name: str) -> str:
    """The address (with its options) or path of `name`, parts divided by /, below `address`."""
    text = str(address)
    if not is_object_store(text):
        return os.path.join(text, *name.split("/"))
    place, question, options = text.partition("?")
    return f"{place.rstrip('/')}/{name}{question}{options}"


def normalised(place: str) -> str:
    """The one spelling of an address, or of an absolute path: without a slash at the end, and of a path without empty
    parts, `.` and `..`. Within an object store these are names of their own."""
    if not is_object_store(place):
        return f"/{os.path.normpath(place).lstrip('/')}"
    address, question, options = place.partition("?")
    return f"{address.rstrip('/')}{question}{options}"


@lru_cache(maxsize=64)
def opened(address: str) -> tuple[fs.FileSystem, str]:
    """Like `resolve`, without a slash at the end; once a process, for places that are asked often: without a region in
    its address the store is asked where the bucket is."""
    filesystem, inner = resolve(address)
    return filesystem, inner.rstrip("/")


def without_options(address: str) -> str:
    """An address in an object store as errors tell it, without a slash at the end. Raises UsageProblem where it holds
    keys, which are told nowhere."""
    place, _, options = address.partition("?")
    if "@" in unquote(options) or not _BUCKET_FIRST.match(place.partition("://")[2]):
        # pyarrow would take the keys, but an address is kept in the run directory and told in errors
        raise UsageProblem(
            f"{_masked(address)}: the name of a bucket should come first, without keys or a port; keys are read from "
            "the environment, another server is ?endpoint_override=HOST:PORT (docs/data.md).",
            "storage/address",
        )
    return place.rstrip("/")


def _object_store(address: str) -> tuple[fs.FileSystem, str]:
    place, _, options = address.partition("?")
    without_options(address)
    try:
        return fs.FileSystem.from_uri(_bounded(address))
    except (OSError, ValueError) as error:  # about an option that is not known, whose value may be a key
        said = str(error).replace(f"?{options}", "")
        for value in filter(None, (part.partition("=")[2] for part in options.split("&"))):
            said = said.replace(value, "…").replace(unquote(value), "…")
        said = one_line(said)
        raise UsageProblem(f"{place}: this storage address cannot be opened ({said}).", "storage/address") from None


def _masked(address: str) -> str:
    """The address without what may be secret in it: its options, and what stands before the name of a bucket."""
    scheme, _, rest = address.partition("://")
    place = rest.partition("?")[0]
    if not _BUCKET_FIRST.match(place):
        _, at, behind = place.rpartition("@")
        place = f"…{at}{behind}" if at else "…"
    return f"{scheme}://{place}"


def _bounded(address: str) -> str:
    """The address with a limit to its retries; S3's client has short ones of its own."""
    if address.startswith("s3://") or "retry_limit_seconds=" in address:
        return address
    return f"{address}{'&' if '?' in address else '?'}retry_limit_seconds={GCS_RETRY_SECONDS}"


def one_line(error: BaseException | str) -> str:
    """What the error says, as one line of at most 300 characters: clients of object stores write whole dumps."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


def fetch(filesystem: fs.FileSystem, inner: str, target: Path) -> str:
    """Copies the file `inner` to the local path `target`; returns its SHA-256 (hex). Raises OSError."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(inner, compression=None) as source, open(target, "wb") as copy:
        while block := source.read(_BLOCK_BYTES):
            digest.update(block)
            copy.write(block)
    return digest.hexdigest()


def send(source: Path, filesystem: fs.FileSystem, inner: str) -> int:
    """Copies the local file `source` to the object `inner`; returns the bytes it had. Raises OSError, and may then have
    left part of it there: what counts is what a manifest, or a stage's record, names later."""
    size_bytes = 0
    with open(source, "rb") as original, filesystem.open_output_stream(inner) as copy:
        while block := original.read(_BLOCK_BYTES):
            copy.write(block)
            size_bytes += len(block)
    return size_bytes


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes] | Any], None]) -> None:
    """Calls `write(stream)` and makes the result appear at `path` whole or not at all.

    Locally: a temporary file beside it, fsync, rename. In an object store: one upload of what was written to memory.
    Parent directories are made. Raises RunProblem where the disk is full or refuses.
    """
    filesystem, inner = resolve(path)
    if is_object_store(path):
        content = io.BytesIO()  # a stream to the store that an error ends would leave half an object there
        write(content)
        try:
            with filesystem.open_output_stream(inner) as stream:
                stream.write(content.getbuffer())
        except OSError as error:
            raise RunProblem(f"{path}: could not be written ({one_line(error)}).", "storage/write") from error
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
        raise RunProblem(f"{path}: could not be written ({error}).", "storage/write") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
