"""Writes the small text files of a run whole or not at all."""

import json
from pathlib import Path
from typing import IO, Any

from corpus.storage import write_atomically


def write_text(path: Path, text: str) -> None:
    """Makes `text` (UTF-8) appear at `path` whole or not at all. Raises RunProblem where the disk refuses it."""

    def write(stream: IO[bytes] | Any) -> None:
        stream.write(text.encode("utf-8"))

    write_atomically(path, write)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Like `write_text`, for JSON that a person may read too. Raises ValueError for NaN, which JSON has no word for."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
