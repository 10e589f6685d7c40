"""The gold preference function: what a perfect judge of the world thinks of a response. Training never sees it."""

from dataclasses import dataclass

from corpus.world.grammar import sentences, share_well_formed
from corpus.world.lexicon import CATEGORIES, HAPPY, ITEMS, RUDE, SAD

WEIGHTS = {
    "task": 0.30,
    "constraint": 0.25,
    "truth": 0.15,
    "clean": 0.12,
    "grammar": 0.08,
    "no_repetition": 0.05,
    "length": 0.05,
}
"""What each component, in [0, 1], adds to the total; they sum to 1."""

LENGTH_SLACK_WORDS = 2


@dataclass(frozen=True)
class Gold:
    """`total` in [0, 1], 1 = perfect: the weighted sum (`WEIGHTS`) of `components`, each in [0, 1]."""

    total: float
    components: dict[str, float]


def gold(meta: dict, response: str) -> Gold:
    """Returns the judgement of a response to the task that `meta` (see `corpus.world.tasks`) describes.

    An answer that says nothing is worth nothing: with no words at all, every component is 0.
    """
    words = response.split()
    if not any(word.isalpha() for word in words):
        return Gold(0.0, dict.fromkeys(WEIGHTS, 0.0))
    components = {
        "task": _task(meta, response, words),
        "constraint": _constraint(meta["constraints"], words),
        "truth": _truth(meta, words),
        "clean": 0.0 if RUDE.intersection(words) else 1.0,
        "grammar": share_well_formed(response),
        "no_repetition": _no_repetition(words),
        "length": _length(len(meta["reference"].split()), len(words)),
    }
    return Gold(sum(WEIGHTS[name] * value for name, value in components.items()), components)


def _task(meta: dict, response: str, words: list[str]) -> float:
    """Returns the share of what was asked that is there, halved for a wrong number of sentences."""
    if meta["list"] is not None:
        asked = meta["list"]["count"]
        listed = {word for word in words if word in ITEMS}
        fitting = listed.intersection(CATEGORIES[meta["list"]["category"]])
        excess = max(0, len(fitting) - asked) + len(listed - fitting)
        done = max(0.0, (min(len(fitting), asked) - excess) / asked)
    else:
        wanted = [word in words for word in meta["must"]]
        if meta["answer_class"]:
            wanted.append(any(word in words for word in meta["answer_class"]))
        done = 0.0 if any(word in words for word in meta["must_not"]) else sum(wanted) / len(wanted)
    return done if len(sentences(response)) == meta["sentences"] else done / 2


def _constraint(constraints: list[dict[str, str]], words: list[str]) -> float:
    """Returns the share of the explicit constraints that are kept, 1 where there are none."""
    if not constraints:
        return 1.0
    return sum(_kept(constraint["type"], constraint["value"], words) for constraint in constraints) / len(constraints)


def _kept(kind: str, value: str, words: list[str]) -> bool:
    said = set(words)
    match kind:
        case "start":
            return words[0] == value
        case "mood":
            asked, other = (set(HAPPY), set(SAD)) if value == "happy" else (set(SAD), set(HAPPY))
            return bool(said & asked) and not said & other
        case "place":
            return value in said
        case "without":
            return value not in said and bool(said & ITEMS)
        case _:
            raise ValueError(f"unknown constraint type {kind!r}")


def _truth(meta: dict, words: list[str]) -> float:
    """Returns 1 where only the true value is stated, or where nothing about the world was asked."""
    if meta["truth"] is None:
        return 1.0
    stated = set(words).intersection(meta["answer_class"])
    return 1.0 if stated == {meta["truth"]["right"]} else 0.0


def _no_repetition(words: list[str]) -> float:
    """Returns 1 less a half for each item or run of three words that comes again, at least 0."""
    runs = list(zip(words, words[1:], words[2:], strict=False))
    items = [word for word in words if word in ITEMS]
    again = (len(runs) - len(set(runs))) + (len(items) - len(set(items)))
    return max(0.0, 1.0 - 0.5 * again)


def _length(target: int, words: int) -> float:
    """Returns 1 within the slack around the target (both in words), falling to 0 at a target's distance beyond it."""
    beyond = max(0, abs(words - target) - LENGTH_SLACK_WORDS)
    return max(0.0, 1.0 - beyond / target)
