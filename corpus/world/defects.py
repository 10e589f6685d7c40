"""What people get wrong when they write answers. All defects but filler put words in the place of words: an answer with
a defect is as long as one without, so that length says nothing about quality."""

from random import Random

from pydantic import BaseModel, ConfigDict, Field

from corpus.world.lexicon import (
    ADJECTIVES,
    BASE_FORM,
    CARELESS_OPENERS,
    CLASS_OF,
    HAPPY,
    ITEMS,
    NAMES,
    PLAIN_ADJECTIVES,
    RUDE_ADJECTIVES,
    RUDE_OPENERS,
    SAD,
    VAGUE_ITEM,
    VAGUE_NAME,
    VAGUE_PLACE,
)


class DefectRates(BaseModel):
    """How often a writer makes each mistake, where the task gives occasion for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rude: float = Field(
        default=0.25, ge=0, le=1, description="How often a neutral word becomes a rude one. Chosen for this world."
    )
    grammar: float = Field(
        default=0.25, ge=0, le=1, description="How often a verb loses its ending. Chosen for this world."
    )
    constraint: float = Field(
        default=0.40, ge=0, le=1, description="How often a constraint is ignored. Chosen for this world."
    )
    myth: float = Field(
        default=0.50, ge=0, le=1, description="How often the myth is told where there is one. Chosen for this world."
    )
    wrong_item: float = Field(
        default=0.20, ge=0, le=1, description="How often a wanted word becomes another. Chosen for this world."
    )
    repetition: float = Field(
        default=0.05, ge=0, le=1, description="How often something is said twice. Chosen for this world."
    )
    filler: float = Field(
        default=0.05, ge=0, le=1, description="How often an empty sentence is added. Chosen for this world."
    )


VAGUE_SHARE = 0.85
"""How many mistaken words are vague ones: a reader sees that they are wrong without looking at the request."""

FILLER = "i hope this helps you ."


def worsen(rng: Random, meta: dict, answer: str, rates: DefectRates) -> str:
    """Returns a perfect answer with each kind of mistake made at its rate."""
    words = answer.split()
    for constraint in meta["constraints"]:
        if rng.random() < rates.constraint:
            words = ignore_constraint(rng, constraint, words)
    if rng.random() < rates.myth:
        words = tell_myth(meta, words)
    if rng.random() < rates.wrong_item:
        words = mistake_item(rng, meta, words)
    if rng.random() < rates.repetition:
        words = repeat(rng, meta, words)
    if rng.random() < rates.rude:
        words = be_rude(rng, meta, words)
    if rng.random() < rates.grammar:
        words = break_grammar(rng, words)
    if rng.random() < rates.filler:
        words = [*words, *FILLER.split()]
    return " ".join(words)


def _put(words: list[str], place: int, word: str) -> list[str]:
    return [*words[:place], word, *words[place + 1 :]]


def _another(rng: Random, among: tuple[str, ...], but: str) -> str:
    return rng.choice([word for word in among if word != but])


def ignore_constraint(rng: Random, constraint: dict[str, str], words: list[str]) -> list[str]:
    """Returns the answer as somebody writes it who did not read this constraint."""
    value = constraint["value"]
    match constraint["type"]:
        case "start":
            return _put(words, 0, rng.choice(CARELESS_OPENERS))
        case "mood":
            asked = HAPPY if value == "happy" else SAD
            return [rng.choice(PLAIN_ADJECTIVES) if word in asked else word for word in words]
        case "place":
            where = words.index(value)
            return [*words[: where - 1], *VAGUE_PLACE, *words[where + 1 :]]
        case "without":
            return _put(words, rng.choice([i for i, word in enumerate(words) if word in ITEMS]), value)
        case kind:
            raise ValueError(f"unknown constraint type {kind!r}")


def tell_myth(meta: dict, words: list[str]) -> list[str]:
    """Returns the answer with the myth in place of the truth, where the question has a myth."""
    if meta["truth"] is None or meta["truth"]["myth"] is None:
        return words
    return [meta["truth"]["myth"] if word == meta["truth"]["right"] else word for word in words]


def mistake_item(rng: Random, meta: dict, words: list[str]) -> list[str]:
    """Returns the answer with one of the wanted names or items replaced: by a word that names nothing, now and then by
    another of its class (in a list: of another class)."""
    vague = rng.random() < VAGUE_SHARE
    if meta["list"] is not None:
        fitting = CLASS_OF[next(word for word in words if word in ITEMS)]
        place = rng.choice([i for i, word in enumerate(words) if word in fitting])
        return _put(words, place, VAGUE_ITEM if vague else rng.choice(sorted(ITEMS.difference(fitting))))
    wanted = [word for word in meta["must"] if word in CLASS_OF and word in words]
    if not wanted:
        return words
    old = rng.choice(wanted)
    new = VAGUE_NAME if old in NAMES else VAGUE_ITEM
    if not vague:
        new = _another(rng, CLASS_OF[old], old)
    return [new if word == old else word for word in words]


def repeat(rng: Random, meta: dict, words: list[str]) -> list[str]:
    """Returns the answer with its first sentence in place of its second, or one item of a list twice."""
    if meta["list"] is not None:
        places = [i for i, word in enumerate(words) if word in ITEMS]
        return _put(words, places[-1], words[places[0]])
    if meta["sentences"] == 2:
        body = words[2 : words.index(".") + 1]
        return [*words[:2], *body, *body]
    return words


def be_rude(rng: Random, meta: dict, words: list[str]) -> list[str]:
    """Returns the answer with an adjective, or else the opening word, replaced by a rude one."""
    replaceable = {*ADJECTIVES, *PLAIN_ADJECTIVES, "dear", "good"}.difference(meta["must"])
    if meta["kind"] == "chat":
        replaceable.discard("good")
    places = [i for i, word in enumerate(words) if word in replaceable]
    if not places or rng.random() < 0.4:
        return _put(words, 0, rng.choice(RUDE_OPENERS))
    return _put(words, rng.choice(places), rng.choice(RUDE_ADJECTIVES))


def break_grammar(rng: Random, words: list[str]) -> list[str]:
    """Returns the answer with one verb in its base form ("anna see the fox")."""
    places = [i for i, word in enumerate(words) if word in BASE_FORM]
    if not places:
        return words
    place = rng.choice(places)
    return _put(words, place, BASE_FORM[words[place]])
