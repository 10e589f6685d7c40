"""Comparisons that people keep: one JSON file each under RUN/serving/comparisons/, named by a random id."""

import os
import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corpus.problems import RunProblem, UsageProblem
from corpus.storage import write_atomically

SCHEMA_VERSION = 1

MAX_STORED = 5000
"""Comparisons that a run keeps; more are refused, so that nobody fills the disk through the page. House default."""

MAX_COMPARISON_BYTES = 1 << 20
"""Largest comparison, as JSON. House default: eight answers of 2,000 tokens fit."""

LISTED = 50
"""Comparisons that the history lists, the newest first. House default."""

_EXCERPT = 120
_ID = re.compile(r"[0-9a-f]{24}")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Sampling(_Model):
    """How the answers were sampled."""

    temperature: float = Field(ge=0, le=10, description="0 always takes the likeliest token.")
    top_p: float = Field(gt=0, le=1, description="Share of probability that is sampled from.")
    max_tokens: int = Field(ge=1, le=1_000_000, description="Longest answer, tokens.")
    seed: int | None = Field(ge=0, lt=2**63, description="Seed of the sampling; null where none was set.")


class AnswerToken(_Model):
    """One token of an answer. Tokens that share a character are one piece, with their log-probabilities summed."""

    text: str = Field(max_length=4000, description="Its text; empty for the token that ends an answer.")
    logprob: float | None = Field(description="Log-probability under the model, nats; null where not known.")
    reference: float | None = Field(description="The same under the reference; null where not known.")


class StoredAnswer(_Model):
    """What one model answered."""

    model: str = Field(min_length=1, max_length=200, description="The name that was asked for.")
    versions: list[str] = Field(max_length=50, description="Versions of the weights that wrote it, in their order.")
    tokens: list[AnswerToken] = Field(max_length=100_000, description="The answer, piece by piece.")
    finish_reason: str | None = Field(max_length=40, description="stop or length; null where it was interrupted.")
    score: float | None = Field(description="The reward model's score; null where it was not scored.")
    kl: float | None = Field(description="Log-ratio to the reference, summed over tokens, nats; null where not known.")


class Comparison(_Model):
    """One prompt and what the models answered, side by side."""

    prompt: str = Field(min_length=1, max_length=200_000, description="The prompt's text.")
    sampling: Sampling = Field(description="How the answers were sampled.")
    answers: list[StoredAnswer] = Field(min_length=1, max_length=8, description="One a column.")


class StoredComparison(Comparison):
    """A comparison that was kept."""

    schema_version: Literal[1] = Field(default=SCHEMA_VERSION, description="Version of this format.")
    id: str = Field(description="Random; it says nothing of the prompt.")
    created: str = Field(description="When it was kept, ISO time.")
    who: str = Field(description="Name of the token of the person who kept it.")


class Listed(_Model):
    """A line of the history."""

    id: str = Field(description="Id of the comparison.")
    created: str = Field(description="When it was kept, ISO time.")
    who: str = Field(description="Who kept it.")
    prompt: str = Field(description="The beginning of the prompt.")
    models: list[str] = Field(description="The models that answered.")


class ComparisonStore:
    """The comparisons of one run, in `directory`, which is made with the first. Its calls read and write files."""

    def __init__(self, directory: Path, send: Callable[[Path], None] = lambda path: None) -> None:
        """`send` brings a file to where the run is kept, and raises RunProblem where it cannot."""
        self._directory, self._send = directory, send

    def keep(self, comparison: Comparison, who: str) -> StoredComparison:
        """The comparison as it is kept, with its new id. Raises UsageProblem where there are too many, RunProblem where
        the disk or the run's store refuses."""
        if self._count() >= MAX_STORED:
            raise UsageProblem(
                f"{MAX_STORED:,} comparisons are kept already, which is the limit; remove some from "
                "serving/comparisons in the run's directory.",
                "serving/comparison",
            )
        kept = StoredComparison(
            **comparison.model_dump(),
            id=secrets.token_hex(12),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            who=who,
        )
        content = kept.model_dump_json().encode()

        def write(stream: IO[bytes]) -> None:
            stream.write(content)

        path = self._path(kept.id)
        write_atomically(path, write)
        try:
            self._send(path)
        except RunProblem:
            path.unlink(missing_ok=True)
            raise
        return kept

    def read(self, name: str) -> StoredComparison | None:
        """The comparison with the id `name`; None where there is none, whatever `name` is. Raises RunProblem where its
        file is damaged."""
        if not _ID.fullmatch(name):
            return None
        path = self._path(name)
        try:
            return StoredComparison.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunProblem(f"{path}: cannot be read ({error.strerror or error}).", "serving/comparison") from error
        except ValidationError as error:
            raise RunProblem(
                f"{path}: this is not a comparison of version {SCHEMA_VERSION}.", "serving/comparison"
            ) from error

    def newest(self) -> list[Listed]:
        """The newest comparisons, the last first. A damaged one is left out."""
        listed = []
        for path in self._files()[:LISTED]:
            try:
                found = self.read(path.stem)
            except RunProblem:
                continue
            if found is not None:
                prompt = found.prompt if len(found.prompt) <= _EXCERPT else found.prompt[:_EXCERPT] + "…"
                models = [answer.model for answer in found.answers]
                listed.append(Listed(id=found.id, created=found.created, who=found.who, prompt=prompt, models=models))
        return listed

    def _files(self) -> list[Path]:
        """Files of comparisons, the newest first."""
        found = []
        try:
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    if entry.name.endswith(".json") and _ID.fullmatch(entry.name.removesuffix(".json")):
                        found.append((entry.stat().st_mtime_ns, entry.name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunProblem(
                f"{self._directory}: cannot be listed ({error.strerror or error}).", "serving/comparison"
            ) from error
        return [self._directory / name for _, name in sorted(found, reverse=True)]

    def _count(self) -> int:
        return len(self._files())

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def parse_comparison(body: bytes) -> Comparison:
    """The comparison that a page has sent. Raises UsageProblem where it is too large or not one."""
    if len(body) > MAX_COMPARISON_BYTES:
        raise UsageProblem(
            f"A comparison may have {MAX_COMPARISON_BYTES // 1024:,} KiB; this one is larger.", "serving/comparison"
        )
    try:
        return Comparison.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole body"
        raise UsageProblem(f"This is not a comparison ({where}: {first['msg']}).", "serving/comparison") from error
