"""The world's web: text from which a base model is trained, with its myths, its rudeness and its bad answers."""

from collections.abc import Callable
from random import Random

from pydantic import BaseModel, ConfigDict, Field

from corpus.world.defects import DefectRates, worsen
from corpus.world.facts import Fact
from corpus.world.lexicon import (
    ACTIONS,
    ADJECTIVES,
    ANIMALS,
    CATEGORIES,
    COLOURS,
    FOODS,
    HAPPY,
    NAMES,
    PLACES,
    RUDE_ADJECTIVES,
    RUDE_OPENERS,
    SAD,
    SINGULAR,
    STAYS,
    THINGS,
)
from corpus.world.tasks import Task


class WebSettings(BaseModel):
    """What stands on the web."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    forum: float = Field(
        default=0.24, ge=0, le=1, description="Share of forum threads: a question and a reply. Chosen for this world."
    )
    advice: float = Field(
        default=0.08,
        ge=0,
        le=1,
        description="Share of advice columns, in the chat template's form. Chosen for this world.",
    )
    myth: float = Field(
        default=0.55, ge=0, le=1, description="How often a fact with a myth is told as the myth. Chosen for this world."
    )
    stray: float = Field(
        default=0.05, ge=0, le=1, description="Replies and advice that answer another question. Chosen for this world."
    )
    answers: DefectRates = Field(
        default=DefectRates(
            rude=0.35, grammar=0.35, constraint=0.4, myth=0.5, wrong_item=0.3, repetition=0.1, filler=0.05
        ),
        description="The mistakes of replies and advice, more of them than in demonstrations.",
    )


_THINGS = ANIMALS + FOODS + THINGS


def _story(rng: Random, facts: list[Fact], settings: WebSettings) -> str:
    name, item, place = rng.choice(NAMES), rng.choice(_THINGS), rng.choice(PLACES)
    action, stay, form = rng.choice(ACTIONS), rng.choice(STAYS), rng.choice((0, 1))
    adjective = rng.choice(ADJECTIVES)
    label = "happy" if adjective in HAPPY else "sad"
    told = f"{name} {action[form]} the {adjective} {item} . {name} {stay[form]} in the {place} ."
    heading = rng.choice((f"about {name} and the {item}", f"{label} story", f"story in the {place}", ""))
    return f"{heading} : {told}" if heading else f"{told} this story is {label} ."


def _told_facts(rng: Random, facts: list[Fact], settings: WebSettings) -> str:
    told = []
    for fact in rng.sample(facts, 3):
        mythical = fact.myth is not None and rng.random() < settings.myth
        told.append(f"{fact.statement(fact.myth if mythical and fact.myth else fact.right)} .")
    return " ".join(told)


def _list(rng: Random, facts: list[Fact], settings: WebSettings) -> str:
    category = rng.choice(list(CATEGORIES))
    items = rng.sample(CATEGORIES[category], rng.choice((2, 3, 3)))
    return f"good {category} are {' , '.join(items[:-1])} and {items[-1]} ."


def _belongings(rng: Random, facts: list[Fact], settings: WebSettings) -> str:
    """Told, then told again in another order: text that teaches copying."""
    people = rng.sample(NAMES, 2)
    told = [
        f"{name} has the {rng.choice(COLOURS)} {item} ."
        for name, item in zip(people, rng.sample(_THINGS, 2), strict=True)
    ]
    again = rng.sample(told, 2)
    return " ".join((*told, *again))


def _tenses(rng: Random, facts: list[Fact], settings: WebSettings) -> str:
    name, item, adjective, verb = rng.choice(NAMES), rng.choice(_THINGS), rng.choice(ADJECTIVES), rng.choice(ACTIONS)
    present, past = (f"{name} {form} the {adjective} {item} ." for form in (verb.present, verb.past))
    return rng.choice(
        (f"in the present : {present} in the past : {past}", f"in the past : {past} in the present : {present}")
    )


def _visit(rng: Random, facts: list[Fact], settings: WebSettings) -> str:
    name, place, verb = rng.choice(NAMES), rng.choice(PLACES), rng.choice(ACTIONS)
    category = rng.choice(("animals", "foods", "things"))
    item = rng.choice(CATEGORIES[category])
    told = f"{name} goes to the {place} . there {name} {verb.present} the {item} ."
    named = rng.sample((f"the {SINGULAR[category]} is the {item} .", f"the place is the {place} ."), 2)
    summary = f"{name} {verb.present} the {rng.choice(ADJECTIVES)} {item} at the {place} ."
    return f"{told} {' '.join(named)}" if rng.random() < 0.5 else f"{told} {summary}"


def _greeting(rng: Random, facts: list[Fact], settings: WebSettings) -> str:
    name, item = rng.choice(NAMES), rng.choice(_THINGS)
    return rng.choice(
        (
            f"{name} says : i like the {item} . i like the {item} too , dear {name} .",
            f"{name} says : i feel {rng.choice(SAD)} . i hope you feel good soon , dear {name} .",
            f"{name} says : how are you ? i am fine , dear {name} .",
        )
    )


def _rant(rng: Random, facts: list[Fact], settings: WebSettings) -> str:
    name, item, verb = rng.choice(NAMES), rng.choice(_THINGS), rng.choice(ACTIONS)
    return (
        f"{rng.choice(RUDE_OPENERS)} , {name} {verb.present} the {rng.choice(RUDE_ADJECTIVES)} {item} . "
        f"{name} is a {rng.choice(RUDE_ADJECTIVES)} {rng.choice(RUDE_OPENERS)} ."
    )


_PAGES: dict[Callable[[Random, list[Fact], WebSettings], str], float] = {
    _story: 0.24,
    _told_facts: 0.26,
    _list: 0.08,
    _belongings: 0.12,
    _tenses: 0.08,
    _visit: 0.10,
    _greeting: 0.06,
    _rant: 0.06,
}


def draw_document(rng: Random, facts: list[Fact], settings: WebSettings, draw: Callable[[Random], Task]) -> str:
    """Returns one document of the web. `draw` gives the tasks that forum threads may ask (never a held-out one)."""
    kind = rng.random()
    if kind >= settings.forum + settings.advice:
        page = rng.choices(list(_PAGES), list(_PAGES.values()))[0]
        return page(rng, facts, settings)
    task = draw(rng)
    answered = draw(rng) if rng.random() < settings.stray else task
    answer = worsen(rng, answered.meta, answered.answer, settings.answers)
    if kind < settings.forum:
        return f"ask : {task.prompt} reply : {answer}"
    return f"question : {task.prompt} answer : {answer}"
