"""Which rows are held out, and which are too many: splits by user, de-duplication, a limit for each user."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

from corpus.dialogues import settled
from corpus.problems import UsageProblem


class _HasUser(Protocol):
    @property
    def user_id(self) -> str: ...


class _HasPrompt(_HasUser, Protocol):
    @property
    def prompt_id(self) -> str: ...
    @property
    def prompt(self) -> str: ...


_Users = TypeVar("_Users", bound=_HasUser)
_Prompts = TypeVar("_Prompts", bound=_HasPrompt)


def is_held_out(user_id: str, fraction: float, seed: int) -> bool:
    """True for about `fraction` of all users.

    It depends on seed and user alone, so that all tables agree and a new user moves nobody.
    """
    digest = blake2b(f"{seed}\0{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def split_by_user(
    rows: Sequence[_Users], fraction: float, seed: int, what: str = "rows"
) -> tuple[list[_Users], list[_Users]]:
    """Training rows and held-out rows in their order; no user has rows in both (InstructGPT: splits by user ID).

    Raises UsageProblem where either side would be empty.
    """
    train = [row for row in rows if not is_held_out(row.user_id, fraction, seed)]
    held_out = [row for row in rows if is_held_out(row.user_id, fraction, seed)]
    if not train or not held_out:
        side = "held-out" if train else "training"
        users = len({row.user_id for row in rows})
        raise UsageProblem(
            f"The {side} split of the {what} is empty: {len(rows)} {what} of {users} user(s), held_out_fraction "
            f"{fraction:g}, split_seed {seed}; give rows of more users, or change one of the two.",
            "data/split",
        )
    return train, held_out


def drop_long_common_prefixes(rows: Iterable[_Prompts], prefix_characters: int) -> list[_Prompts]:
    """The first of all rows whose prompts share their first `prefix_characters` characters, or are equal.

    InstructGPT de-duplicates "by checking for prompts that share a long common prefix" and gives no length.
    """
    first: dict[str, _Prompts] = {}
    for row in rows:
        first.setdefault(row.prompt[:prefix_characters], row)
    return list(first.values())


class HeldOutPrompts:
    """The prompts that no training text may have: equal ones, or ones with the same long prefix."""

    def __init__(self, prompts: Iterable[str], prefix_characters: int) -> None:
        """`prompts` are held out; two count as one as in `drop_long_common_prefixes`, outer white space aside."""
        self._length = prefix_characters
        self._prefixes = {prefix for prompt in prompts for prefix in self._prefixes_of(prompt)}

    def __contains__(self, prompt: str) -> bool:
        return not self._prefixes.isdisjoint(self._prefixes_of(prompt))

    def _prefixes_of(self, prompt: str) -> tuple[str, str]:
        return prompt[: self._length], settled(prompt)[: self._length]


def limit_per_user(rows: Iterable[_Prompts], most: int) -> list[_Prompts]:
    """The rows of each user's first `most` prompts (InstructGPT: 200); several rows of one prompt count once."""
    prompts: dict[str, set[str]] = defaultdict(set)
    kept = []
    for row in rows:
        mine = prompts[row.user_id]
        if row.prompt_id in mine or len(mine) < most:
            mine.add(row.prompt_id)
            kept.append(row)
    return kept
