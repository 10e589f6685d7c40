"""What is true in the world, and the myths that its web repeats."""

from dataclasses import dataclass
from random import Random

from corpus.world.lexicon import ANIMALS, COLOURS, FOODS, JOBS, NAMES, PLACES, THINGS


@dataclass(frozen=True)
class Fact:
    """One truth: `relation` is home, food, colour or job; `myth` is the false value that people repeat, if any."""

    subject: str
    relation: str
    right: str
    myth: str | None

    @property
    def subject_phrase(self) -> str:
        return self.subject if self.subject in NAMES else f"the {self.subject}"

    def statement(self, value: str) -> str:
        """The sentence that gives the subject this value, without its full stop."""
        verb = {"home": "lives in the", "food": "eats", "colour": "is", "job": "is a"}[self.relation]
        return f"{self.subject_phrase} {verb} {value}"


VALUES = {"home": PLACES, "food": FOODS, "colour": COLOURS, "job": JOBS}
SUBJECTS = (("home", ANIMALS), ("food", ANIMALS), ("colour", THINGS), ("job", NAMES))


def draw_facts(rng: Random, myth_share: float) -> list[Fact]:
    """Returns every fact of a world; about `myth_share` of them have a myth."""
    facts = []
    for relation, subjects in SUBJECTS:
        for subject in subjects:
            right, other = rng.sample(VALUES[relation], 2)
            facts.append(Fact(subject, relation, right, other if rng.random() < myth_share else None))
    return facts
