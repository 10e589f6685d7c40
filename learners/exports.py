"""Exported directories that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from corpus.problems import RunProblem


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A fresh directory to write into, which takes the place of `directory` when the block ends well.

    Raises RunProblem where the disk is full or refuses; what stood at `directory` is then still there.
    """
    partial = directory.with_name(directory.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(partial, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunProblem(f"{directory}: the export was not written ({error}).", "storage/write") from error
