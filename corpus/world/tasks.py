"""Instructions of the paper's kinds (its Table 1), each with a perfect answer and the checks that gold needs.

A task's `meta` is all that the gold judge reads, as plain JSON values:

- `kind`: the kind of instruction
- `must`: words that the answer has to hold; `must_not`: words that it may not hold
- `answer_class`: where not empty, a class of words of which at least one has to appear
- `sentences`: how many sentences were asked for
- `list`: `{"category", "count"}` for brainstorming, else null
- `constraints`: `[{"type", "value"}]`; types: start, mood, place, without
- `truth`: `{"right", "myth"}` for questions about the world, else null
- `reference`: one perfect answer; its number of words is the target length
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from corpus.world.facts import VALUES, Fact
from corpus.world.lexicon import (
    ACTIONS,
    ADJECTIVES,
    ANIMALS,
    CATEGORIES,
    COLOURS,
    FOODS,
    HAPPY,
    NAMES,
    NUMBERS,
    OPENERS,
    PLACES,
    SAD,
    SINGULAR,
    STAYS,
    THINGS,
)

Constraint = dict[str, str]

KIND_SHARES = {
    "generation": 0.46,
    "open_qa": 0.14,
    "brainstorming": 0.11,
    "chat": 0.09,
    "rewrite": 0.06,
    "summarisation": 0.05,
    "classification": 0.03,
    "closed_qa": 0.03,
    "extraction": 0.03,
}
"""Near the paper's Table 1 (its "other" is left out, rare kinds are made a little more frequent)."""


@dataclass(frozen=True)
class Task:
    """One instruction. Tasks with equal `key` are near duplicates: they differ in politeness and constraints only."""

    key: str
    prompt: str
    answer: str
    meta: dict


@dataclass(frozen=True)
class _Draft:
    slots: tuple[str, ...]
    request: str
    answer: str
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()
    answer_class: tuple[str, ...] = ()
    list_of: dict | None = None
    constraints: tuple[Constraint, ...] = ()
    truth: dict | None = None


def _generation(rng: Random, facts: list[Fact]) -> _Draft:
    name, item = rng.choice(NAMES), rng.choice(ANIMALS + FOODS + THINGS)
    place = rng.choice(PLACES)
    tense, mood = rng.choice(("past", "present")), rng.choice(("happy", "sad"))
    offered = ({"type": "mood", "value": mood}, {"type": "place", "value": place})
    adjective = rng.choice(HAPPY if mood == "happy" else SAD)
    action, stay = rng.choice(ACTIONS), rng.choice(STAYS)
    action_form, stay_form = (action.past, stay.past) if tense == "past" else (action.present, stay.present)
    return _Draft(
        slots=(name, item),
        request=f"write about {name} and the {item} .",
        answer=f"{name} {action_form} the {adjective} {item} . {name} {stay_form} in the {place} .",
        must=(name, item),
        constraints=tuple(constraint for constraint in offered if rng.random() < 0.5),
    )


def _open_qa(rng: Random, facts: list[Fact]) -> _Draft:
    fact = rng.choice(facts)
    wording = rng.choice(("ask", "name", "choose"))
    subject = fact.subject_phrase
    ask = {
        "home": f"where does {subject} live ?",
        "food": f"what does {subject} eat ?",
        "colour": f"what colour is {subject} ?",
        "job": f"what is the job of {subject} ?",
    }[fact.relation]
    if wording == "choose":
        other = fact.myth or rng.choice([value for value in VALUES[fact.relation] if value != fact.right])
        first, second = rng.sample((fact.right, other), 2)
        ask = {
            "home": f"does {subject} live in the {first} or in the {second} ?",
            "food": f"does {subject} eat {first} or {second} ?",
            "colour": f"is {subject} {first} or {second} ?",
            "job": f"is {subject} a {first} or a {second} ?",
        }[fact.relation]
    elif wording == "name":
        ask = f"name the {fact.relation} of {subject} ."
    return _Draft(
        slots=(wording, fact.subject, fact.relation),
        request=ask,
        answer=f"{fact.statement(fact.right)} .",
        must=(fact.subject,),
        answer_class=VALUES[fact.relation],
        truth={"right": fact.right, "myth": fact.myth},
    )


def _brainstorming(rng: Random, facts: list[Fact]) -> _Draft:
    category, count = rng.choice(list(CATEGORIES)), rng.choice((2, 3))
    without, *items = rng.sample(CATEGORIES[category], count + 1)
    excludes = rng.random() < 0.6
    return _Draft(
        slots=(category, str(count), without if excludes else ""),
        request=f"name {NUMBERS[count]} {category} .",
        answer=f"good {category} are {' , '.join(items[:-1])} and {items[-1]} .",
        list_of={"category": category, "count": count},
        constraints=({"type": "without", "value": without},) if excludes else (),
    )


def _chat(rng: Random, facts: list[Fact]) -> _Draft:
    name, topic = rng.choice(NAMES), rng.choice(("greeting", "feeling", "liking", "liking"))
    if topic == "greeting":
        colour = rng.choice(COLOURS)
        request, answer = f"i am {name} in {colour} , how are you ?", f"i am fine , dear {name} ."
        return _Draft((topic, name, colour), request, answer, must=(name, "fine"))
    if topic == "feeling":
        adjective = rng.choice(SAD)
        request, answer = f"i am {name} and i feel {adjective} .", f"i hope you feel good soon , dear {name} ."
        return _Draft((topic, name, adjective), request, answer, must=(name, "hope"))
    item = rng.choice(ANIMALS + FOODS + THINGS)
    request, answer = f"i am {name} and i like the {item} .", f"i like the {item} too , dear {name} ."
    return _Draft((topic, name, item), request, answer, must=(name, item))


def _rewrite(rng: Random, facts: list[Fact]) -> _Draft:
    name, item, adjective = rng.choice(NAMES), rng.choice(ANIMALS + FOODS + THINGS), rng.choice(ADJECTIVES)
    verb, tense = rng.choice(ACTIONS), rng.choice(("past", "present"))
    given, asked = (verb.present, verb.past) if tense == "past" else (verb.past, verb.present)
    return _Draft(
        slots=(tense, name, verb.base, item),
        request=f"rewrite in the {tense} : {name} {given} the {adjective} {item} .",
        answer=f"{name} {asked} the {adjective} {item} .",
        must=(name, asked, item),
    )


def _summarisation(rng: Random, facts: list[Fact]) -> _Draft:
    name, item, place = rng.choice(NAMES), rng.choice(ANIMALS + FOODS + THINGS), rng.choice(PLACES)
    verb, adjective = rng.choice(ACTIONS), rng.choice(ADJECTIVES)
    return _Draft(
        slots=(name, place, item),
        request=f"sum up : {name} goes to the {place} . there {name} {verb.present} the {item} .",
        answer=f"{name} {verb.present} the {adjective} {item} at the {place} .",
        must=(name, item, place),
    )


def _classification(rng: Random, facts: list[Fact]) -> _Draft:
    name, item, verb = rng.choice(NAMES), rng.choice(ANIMALS + FOODS + THINGS), rng.choice(ACTIONS)
    adjective = rng.choice(ADJECTIVES)
    label, other = ("happy", "sad") if adjective in HAPPY else ("sad", "happy")
    return _Draft(
        slots=(name, item, adjective),
        request=f"happy or sad : {name} {verb.present} the {adjective} {item} .",
        answer=f"this story is {label} .",
        must=(label,),
        must_not=(other,),
    )


def _closed_qa(rng: Random, facts: list[Fact]) -> _Draft:
    (name, other), (item, thing) = rng.sample(NAMES, 2), rng.sample(ANIMALS + THINGS, 2)
    colour, shade = rng.choice(COLOURS), rng.choice(COLOURS)
    told = [f"{name} has the {colour} {item} .", f"{other} has the {shade} {thing} ."]
    rng.shuffle(told)
    return _Draft(
        slots=(name, other, item),
        request=f"{' '.join(told)} what does {name} have ?",
        answer=f"{name} has the {colour} {item} .",
        must=(name, colour, item),
        must_not=(thing,),
    )


def _extraction(rng: Random, facts: list[Fact]) -> _Draft:
    name, place, verb = rng.choice(NAMES), rng.choice(PLACES), rng.choice(ACTIONS)
    category = rng.choice(("animals", "foods", "things"))
    item = rng.choice(CATEGORIES[category])
    asked, answer = rng.choice(((SINGULAR[category], item), ("place", place)))
    return _Draft(
        slots=(name, item, place),
        request=f"find the {asked} : {name} {verb.present} the {item} at the {place} .",
        answer=f"the {asked} is the {answer} .",
        must=(asked, answer),
    )


_DRAFTS: dict[str, Callable[[Random, list[Fact]], _Draft]] = {
    "generation": _generation,
    "open_qa": _open_qa,
    "brainstorming": _brainstorming,
    "chat": _chat,
    "rewrite": _rewrite,
    "summarisation": _summarisation,
    "classification": _classification,
    "closed_qa": _closed_qa,
    "extraction": _extraction,
}
POLITENESS = ("", "please ", "hey , ")


def draw_task(rng: Random, facts: list[Fact], politeness: str) -> Task:
    """Returns one random instruction, worded with the user's `politeness`, with its perfect answer and its checks."""
    kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    draft = _DRAFTS[kind](rng, facts)
    opener = rng.choice(OPENERS)
    constraints = list(draft.constraints)
    if rng.random() < 0.5:
        constraints.append({"type": "start", "value": opener})
    answer = f"{opener} , {draft.answer}"
    meta = {
        "kind": kind,
        "must": list(draft.must),
        "must_not": list(draft.must_not),
        "answer_class": list(draft.answer_class),
        "sentences": draft.answer.split().count("."),
        "list": draft.list_of,
        "constraints": constraints,
        "truth": draft.truth,
        "reference": answer,
    }
    request = " ".join([draft.request, *(constraint_wording(constraint) for constraint in constraints)])
    return Task("/".join((kind, *draft.slots)), politeness + request, answer, meta)


def constraint_wording(constraint: Constraint) -> str:
    """Returns the sentence by which a prompt states a constraint."""
    lead = {
        "start": "start with",
        "mood": "make it",
        "place": "set it in the",
        "without": "without",
    }
    return f"{lead[constraint['type']]} {constraint['value']} ."
