"""What people said, before tokenising: rows of text, and the corpus that a run is made from.

A prompt is one string. A plain prompt is the request itself; a conversation is written as a dialogue
("\\n\\nHuman: …\\n\\nAssistant: …\\n\\nHuman: …\\n\\nAssistant:"), see corpus/dialogues.py.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol


class PromptLike(Protocol):
    """What a row needs to become tokens; the built-in world's rows are such rows too."""

    @property
    def prompt_id(self) -> str: ...
    @property
    def user_id(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def meta(self) -> dict[str, Any]: ...


class DemonstrationLike(PromptLike, Protocol):
    """A prompt with its answer."""

    @property
    def response(self) -> str: ...


@dataclass(frozen=True)
class Document:
    """One text to learn the language from, and whose it is (a split keeps a user's texts together)."""

    user_id: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """One request. `meta` travels along untouched (as JSON in the tables)."""

    prompt_id: str
    user_id: str
    prompt: str
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """One request and the answer that a person wrote for it."""

    prompt_id: str
    user_id: str
    prompt: str
    response: str
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One request and K >= 2 answers ranked by one labeler: rank 0 is best, equal ranks are ties."""

    prompt_id: str
    user_id: str
    labeler_id: str
    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """All that a run starts from. The comparisons are None where it was given none."""

    pretraining_train: list[str]
    pretraining_valid: list[str]
    demonstrations_train: list[Demonstration]
    demonstrations_valid: list[Demonstration]
    prompts_ppo: list[Prompt]
    prompts_heldout: list[Prompt]
    comparisons_train: list[Comparison] | None = None
    comparisons_valid: list[Comparison] | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    """Part (pretraining, demonstrations, prompts, comparisons) → its training rows that were left out because their
    prompt is held out in some part."""
