"""What people said, before tokenising: rows of text, and the corpus that a run is made from.

A prompt is one string. A plain prompt is the request itself; a conversation is written as a dialogue
("\\n\\nHuman: …\\n\\nAssistant: …\\n\\nHuman: …\\n\\nAssistant:"), see corpus/dialogues.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One request. `meta` is a JSON string that travels along untouched, or empty."""

    prompt_id: str
    user_id: str
    prompt: str
    meta: str = ""


@dataclass(frozen=True)
class Demonstration:
    """One request and the answer that a person wrote for it."""

    prompt_id: str
    user_id: str
    prompt: str
    response: str
    meta: str = ""


@dataclass(frozen=True)
class Comparison:
    """One request and K >= 2 answers ranked by one labeler: rank 0 is best, equal ranks are ties."""

    prompt_id: str
    user_id: str
    labeler_id: str
    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    meta: str = ""


@dataclass(frozen=True)
class Corpus:
    """All that a run starts from. The comparisons are None where the run collects its own."""

    pretraining_train: list[str]
    pretraining_valid: list[str]
    demonstrations_train: list[Demonstration]
    demonstrations_valid: list[Demonstration]
    prompts_ppo: list[Prompt]
    prompts_heldout: list[Prompt]
    comparisons_train: list[Comparison] | None = None
    comparisons_valid: list[Comparison] | None = None
