"""A run's corpus from files (or the Hub): which source gives what, held-out rows, de-duplication."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from corpus.dialogues import prompts_in
from corpus.formats import Format, Rows, read_source
from corpus.problems import UsageProblem
from corpus.rows import Comparison, Corpus, Demonstration, Document, Prompt
from corpus.splits import HeldOutPrompts, drop_long_common_prefixes, limit_per_user, split_by_user

_Row = TypeVar("_Row", Document, Demonstration, Prompt, Comparison)
_Any = TypeVar("_Any", bound=str | Demonstration | Prompt | Comparison)
_Prompt = TypeVar("_Prompt", Demonstration, Prompt)


class Source(BaseModel):
    """One place that rows are read from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = Field(
        description="A file, directory or glob (local, s3://…, gs://…), or hub:NAME or hub:NAME:SPLIT. No default."
    )
    format: Format | Literal["auto"] = Field(
        default="auto",
        description="The format of its rows; auto tells it by their columns (docs/data.md). House default.",
    )
    licence: str | None = Field(
        default=None,
        description="The licence of its data, for lineage and report; by default what its card on the Hub states.",
    )


class FileCorpusSettings(BaseModel):
    """A corpus of one's own. `path` alone is enough: it fills every part that has no source of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str | None = Field(
        default=None,
        description="The source of all parts that have none of their own: a file, directory or glob "
        "(local, s3://…, gs://…), or hub:NAME or hub:NAME:SPLIT.",
    )
    format: Format | Literal["auto"] = Field(
        default="auto",
        description="The format of the rows in path; auto tells it by their columns (docs/data.md). House default.",
    )
    licence: str | None = Field(
        default=None,
        description="The licence of the data in path, for lineage and report; by default what its card on the Hub "
        "states.",
    )
    pretraining: Source | None = Field(
        default=None, description="Documents for the base model and the pretraining term; by default those of path."
    )
    demonstrations: Source | None = Field(
        default=None, description="Prompts with answers to imitate; by default those of path."
    )
    prompts: Source | None = Field(default=None, description="Prompts for PPO; by default those of path.")
    comparisons: Source | None = Field(
        default=None,
        description="Ranked answers; by default those of path. A corpus needs some: only the built-in world has "
        "labelers to collect them from.",
    )
    held_out_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of users held out. Ours; InstructGPT splits by user ID and holds out 11 to 35 % of prompts.",
    )
    split_seed: int = Field(default=0, description="Seed of the hash that says which users are held out. Ours.")
    duplicate_prefix_characters: int = Field(
        default=200,
        ge=1,
        description="Prompts and demonstrations whose first so many characters are the same count as one. InstructGPT "
        'de-duplicates by "a long common prefix" and gives no length: the number is ours.',
    )
    max_prompts_per_user: int = Field(default=200, ge=1, description="Prompts kept of one user. InstructGPT: 200.")

    @field_validator("pretraining", "demonstrations", "prompts", "comparisons", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


def load_files(settings: FileCorpusSettings) -> Corpus:
    """The corpus, untokenised and split by user. Its comparisons are None where no source holds any.

    A user's rows are all for training or all held out, in every part. A prompt that several rows share is one of the
    prompts; comparisons of one prompt are all kept. Training rows whose prompt is held out in any part, because another
    user asked the same, are left out and counted (`Corpus.left_out`).
    Raises UsageProblem where a source cannot be read or a row is malformed (naming its place), where there are no
    documents, demonstrations or prompts, and where a split is empty.
    """
    read: dict[tuple[str, str], Rows] = {}

    def part(name: Literal["pretraining", "demonstrations", "prompts", "comparisons"]) -> Rows:
        source = getattr(settings, name) or (
            Source(path=settings.path, format=settings.format) if settings.path else None
        )
        if source is None:
            if name == "comparisons":
                return Rows()
            raise UsageProblem(
                f"The corpus has no source for its {name}: give corpus.path or corpus.{name}.", "data/no-source"
            )
        if (source.path, source.format) not in read:
            read[source.path, source.format] = read_source(source.path, source.format)
        return read[source.path, source.format]

    def split(rows: Sequence[_Row], what: str) -> tuple[list[_Row], list[_Row]]:
        return split_by_user(rows, settings.held_out_fraction, settings.split_seed, what)

    def thinned(rows: Sequence[_Prompt], what: str) -> list[_Prompt]:
        if not rows:
            raise UsageProblem(f"The corpus has no {what}: no source of it holds any.", "data/empty")
        distinct = drop_long_common_prefixes(rows, settings.duplicate_prefix_characters)
        return limit_per_user(distinct, settings.max_prompts_per_user)

    documents = split(part("pretraining").documents, "documents")
    demonstrations = split(thinned(part("demonstrations").demonstrations, "demonstrations"), "demonstrations")
    prompts = split(thinned(part("prompts").prompts, "prompts"), "prompts")
    ranked = limit_per_user(part("comparisons").comparisons, settings.max_prompts_per_user)
    if settings.comparisons is not None and not ranked:
        raise UsageProblem(
            f"{settings.comparisons.path}: there are no comparisons (pairs or rankings) in this source.", "data/empty"
        )
    comparisons = split(ranked, "comparisons") if ranked else (None, None)
    texts = [document.text for document in documents[0]]
    held_out = [row.prompt for row in (*demonstrations[1], *prompts[1], *(comparisons[1] or []))]
    held_out += [asked[-1] for document in documents[1] if (asked := prompts_in(document.text))]
    known = HeldOutPrompts(held_out, settings.duplicate_prefix_characters)
    left_out: dict[str, int] = {}

    def unseen(rows: Sequence[_Any], part: str, prompts_of: Callable[[_Any], Sequence[str]]) -> list[_Any]:
        kept = [row for row in rows if not any(prompt in known for prompt in prompts_of(row))]
        left_out[part] = len(rows) - len(kept)
        if rows and not kept:
            raise UsageProblem(
                f"The training split of the {part} is empty: the prompt of each of its {len(rows)} rows is held out "
                f"too, because users share prompts (or their first {settings.duplicate_prefix_characters} characters); "
                "give other rows, a smaller held_out_fraction, or a larger duplicate_prefix_characters.",
                "data/split",
            )
        return kept

    def prompt_of_row(row: Demonstration | Prompt | Comparison) -> Sequence[str]:
        return (row.prompt,)

    return Corpus(
        pretraining_train=unseen(texts, "pretraining", prompts_in),
        pretraining_valid=[document.text for document in documents[1]],
        demonstrations_train=unseen(demonstrations[0], "demonstrations", prompt_of_row),
        demonstrations_valid=demonstrations[1],
        prompts_ppo=unseen(prompts[0], "prompts", prompt_of_row),
        prompts_heldout=prompts[1],
        comparisons_train=None if comparisons[0] is None else unseen(comparisons[0], "comparisons", prompt_of_row),
        comparisons_valid=comparisons[1],
        left_out=left_out,
    )
