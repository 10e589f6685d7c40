"""The grammar of answers: which sentences are well formed. Rude words are grammatical; rudeness is judged elsewhere."""

import re

from corpus.world.lexicon import (
    ACTIONS,
    ADJECTIVES,
    ANIMALS,
    CARELESS_OPENERS,
    CATEGORIES,
    COLOURS,
    FOODS,
    ITEMS,
    JOBS,
    NAMES,
    OPENERS,
    PLACES,
    PLAIN_ADJECTIVES,
    RUDE_ADJECTIVES,
    RUDE_OPENERS,
    SINGULAR,
    STAYS,
    THINGS,
    VAGUE_ITEM,
    VAGUE_NAME,
    VAGUE_PLACE,
    Verb,
)


def _any(words: tuple[str, ...] | list[str]) -> str:
    return "(?:" + "|".join(words) + ")"


def _forms(verbs: tuple[Verb, ...]) -> str:
    return _any([form for verb in verbs for form in (verb.present, verb.past)])


_NAME, _ITEM = _any((*NAMES, VAGUE_NAME)), _any((*sorted(ITEMS), VAGUE_ITEM))
_PLACE = _any((*(f"the {place}" for place in PLACES), " ".join(VAGUE_PLACE)))
_ADJECTIVE = _any(ADJECTIVES + PLAIN_ADJECTIVES + RUDE_ADJECTIVES)
_DEAR = _any(("dear", *RUDE_ADJECTIVES))
_GOOD = _any(("good", *RUDE_ADJECTIVES))

SENTENCES = (
    f"{_NAME} {_forms(ACTIONS)} the {_ADJECTIVE} {_ITEM}",
    f"{_NAME} {_forms(ACTIONS)} the {_ADJECTIVE} {_ITEM} at {_PLACE}",
    f"{_NAME} {_forms(STAYS)} in {_PLACE}",
    f"the (?:{_any(ANIMALS)}|{VAGUE_ITEM}) lives in {_PLACE}",
    f"the (?:{_any(ANIMALS)}|{VAGUE_ITEM}) eats {_any(FOODS)}",
    f"the (?:{_any(THINGS)}|{VAGUE_ITEM}) is {_any(COLOURS)}",
    f"{_NAME} is a {_any(JOBS)}",
    f"{_GOOD} {_any(list(CATEGORIES))} are {_ITEM}(?: , {_ITEM})* and {_ITEM}",
    f"i am fine , {_DEAR} {_NAME}",
    f"i like the {_ITEM} too , {_DEAR} {_NAME}",
    f"i hope you feel good soon , {_DEAR} {_NAME}",
    "this story is (?:happy|sad)",
    f"{_NAME} has the {_any((*COLOURS, VAGUE_ITEM))} {_ITEM}",
    f"the {_any(list(SINGULAR.values()))} is the {_ITEM}",
    "i hope this helps you",
)
_SENTENCE = re.compile("|".join(SENTENCES))
_OPENING = re.compile(f"^{_any(OPENERS + CARELESS_OPENERS + RUDE_OPENERS)} , ")


def sentences(response: str) -> list[str]:
    """Returns the sentences of a response, full stops and the opener ("well ,") removed."""
    body = _OPENING.sub("", " ".join(response.split()), count=1)
    return [part for part in (piece.strip() for piece in f" {body} ".split(" . ")) if part]


def share_well_formed(response: str) -> float:
    """Returns the share of the response's sentences that the grammar knows; 0 where the last full stop is missing."""
    found = sentences(response)
    if not found or not response.rstrip().endswith("."):
        return 0.0
    return sum(1 for sentence in found if _SENTENCE.fullmatch(sentence)) / len(found)
