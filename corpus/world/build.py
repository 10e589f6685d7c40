"""A whole world from one seed: what the web says, what people ask, how they answer, and who judges."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from corpus.problems import UsageProblem
from corpus.world.defects import DefectRates, worsen
from corpus.world.facts import Fact, draw_facts
from corpus.world.labelers import Labeler, LabelerSettings, draw_labelers
from corpus.world.tasks import POLITENESS, Task, draw_task
from corpus.world.web import WebSettings, draw_document

MOST_DRAWS = 200_000
"""Instructions drawn, in about 2 s, until one is on the wanted side and new; the default shares need about 10."""

Side = Literal["training", "validation", "held-out"]


class WorldSettings(BaseModel):
    """The built-in world. Sizes are those of the demo; rates were chosen so that people's demonstrations leave room
    for a policy that does better than they do, and do not differ in length from what gold wants."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = Field(default=0, description="Everything is drawn from this. Chosen for this world.")
    pretraining_train: int = Field(
        default=40_000,
        ge=1,
        description="Documents to train the base model and the pretraining term. Chosen for this world.",
    )
    pretraining_valid: int = Field(
        default=500, ge=1, description="Documents on which the pretraining loss is measured. Chosen for this world."
    )
    demonstrations_train: int = Field(
        default=3_200, ge=1, description="Demonstrations to fine-tune on. Chosen for this world."
    )
    demonstrations_valid: int = Field(
        default=200, ge=1, description="Demonstrations of users whom fine-tuning does not see. Chosen for this world."
    )
    prompts_collect: int = Field(
        default=1_200,
        ge=1,
        description="Prompts whose sampled responses are ranked by labelers. Chosen for this world.",
    )
    prompts_ppo: int = Field(default=4_000, ge=1, description="Prompts of PPO episodes. Chosen for this world.")
    prompts_heldout: int = Field(
        default=400, ge=1, description="Prompts kept for evaluation, with their near duplicates. Chosen for this world."
    )
    prompts_per_user: int = Field(
        default=20, ge=1, le=200, description="Prompts a user writes; InstructGPT keeps at most 200."
    )
    heldout_share: float = Field(
        default=0.12,
        gt=0,
        lt=1,
        description="Share of all possible instructions that only held-out prompts may use. Chosen for this world.",
    )
    validation_share: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of all possible instructions that only validation rows may use: demonstrations_valid, and "
        "collected prompts of users whose rankings validate the reward model. Chosen for this world.",
    )
    myth_share: float = Field(
        default=0.35, ge=0, le=1, description="Share of facts that have a myth. Chosen for this world."
    )
    demonstrations: DefectRates = Field(default=DefectRates(), description="The mistakes in demonstrations.")
    web: WebSettings = Field(default=WebSettings(), description="What pretraining text is made of.")
    labelers: LabelerSettings = Field(default=LabelerSettings(), description="Who ranks responses.")

    @model_validator(mode="after")
    def _leaves_some_for_training(self) -> "WorldSettings":
        if self.heldout_share + self.validation_share >= 1:
            raise ValueError(
                f"heldout_share {self.heldout_share:g} and validation_share {self.validation_share:g} leave no "
                "instructions for training; their sum should be below 1"
            )
        return self


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a person's answer. `prompt` is what the user wrote, without the chat template."""

    prompt_id: str
    user_id: str
    prompt: str
    response: str
    meta: dict


@dataclass(frozen=True)
class Prompt:
    """What a user wrote, without the chat template; `meta` is what `gold` judges a response by."""

    prompt_id: str
    user_id: str
    prompt: str
    meta: dict


@dataclass(frozen=True)
class World:
    """All that a run reads. No user is in two of the lists; held-out and validation instructions are in none of the
    training text, in no wording."""

    synthetic: bool
    settings: WorldSettings
    pretraining_train: list[str]
    pretraining_valid: list[str]
    demonstrations_train: list[Demonstration]
    demonstrations_valid: list[Demonstration]
    prompts_collect: list[Prompt]
    prompts_ppo: list[Prompt]
    prompts_heldout: list[Prompt]
    labelers: list[Labeler]
    heldout_labelers: list[Labeler]


def _nobody(user_id: str) -> bool:
    return False


def build_world(settings: WorldSettings, validates: Callable[[str], bool] = _nobody) -> World:
    """Returns the world of these settings: the same settings always give the same world.

    `validates` says of a user of `prompts_collect` whether the rankings of their prompts validate the reward model:
    such a user asks validation instructions alone, every other one training instructions.
    """
    facts = draw_facts(_stream(settings, "facts"), settings.myth_share)
    labelers, heldout_labelers = draw_labelers(_stream(settings, "labelers"), settings.labelers)

    def of_collected(user_id: str) -> Side:
        return "validation" if validates(user_id) else "training"

    return World(
        synthetic=True,
        settings=settings,
        pretraining_train=_documents(settings, facts, "pretraining-train", settings.pretraining_train),
        pretraining_valid=_documents(settings, facts, "pretraining-valid", settings.pretraining_valid),
        demonstrations_train=_demonstrations(
            settings, facts, "demonstrations-train", settings.demonstrations_train, "training"
        ),
        demonstrations_valid=_demonstrations(
            settings, facts, "demonstrations-valid", settings.demonstrations_valid, "validation"
        ),
        prompts_collect=_prompts(settings, facts, "collect", settings.prompts_collect, of_collected),
        prompts_ppo=_prompts(settings, facts, "ppo", settings.prompts_ppo, lambda _: "training"),
        prompts_heldout=_prompts(settings, facts, "heldout", settings.prompts_heldout, lambda _: "held-out"),
        labelers=labelers,
        heldout_labelers=heldout_labelers,
    )


def _stream(settings: WorldSettings, name: str) -> Random:
    """Each part has its own stream, so that the size of one does not change the others."""
    return Random(f"{settings.seed}/{name}")


def side_of(settings: WorldSettings, key: str) -> Side:
    """Returns who alone may use the instructions of this key (`Task.key`).

    By the key and not by the prompt, so that a rewording of a validation or held-out prompt is in no training text
    either. A tenth of the keys is enough for validation: there are about 8,000 of them, and about 100 of the kind that
    has fewest (brainstorming), each with many wordings.
    """
    at = zlib.crc32(f"{settings.seed}/{key}".encode()) / 2**32
    if at < settings.heldout_share:
        return "held-out"
    return "validation" if at < settings.heldout_share + settings.validation_share else "training"


def _draw(
    rng: Random, settings: WorldSettings, facts: list[Fact], politeness: str, side: Side, draws: Iterator[int]
) -> Task:
    """The first task on the wanted side. UsageProblem where `draws` ends before: a share so near 0 or 1 leaves none."""
    for _ in draws:
        task = draw_task(rng, facts, politeness)
        if side_of(settings, task.key) == side:
            return task
    heldout, validation = f"heldout_share {settings.heldout_share:g}", f"validation_share {settings.validation_share:g}"
    shares, change = {
        "training": (f"{heldout} and {validation} leave", "lower one of them"),
        "validation": (
            f"{validation} leaves",
            f"raise it, or lower world.demonstrations_valid ({settings.demonstrations_valid}) or, for the reward "
            "model's validation, collect.held_out_fraction",
        ),
        "held-out": (f"{heldout} leaves", f"raise it or lower world.prompts_heldout ({settings.prompts_heldout})"),
    }[side]
    raise UsageProblem(
        f"World.{shares} too few instructions for {'held-out prompts' if side == 'held-out' else side}: none was found "
        f"in {MOST_DRAWS:,} draws; {change}.",
        "recipe/world",
    )


def _documents(settings: WorldSettings, facts: list[Fact], name: str, count: int) -> list[str]:
    rng = _stream(settings, name)

    def draw(rng: Random) -> Task:
        return _draw(rng, settings, facts, rng.choice(POLITENESS), "training", iter(range(MOST_DRAWS)))

    return [draw_document(rng, facts, settings.web, draw) for _ in range(count)]


def _asked(
    settings: WorldSettings, facts: list[Fact], name: str, count: int, side_of_user: Callable[[str], Side]
) -> list[tuple[str, str, Task]]:
    """Returns prompt id, user id and task of `count` instructions, each on the side of its user; those that are not for
    training are all different, because each of them is to count in what is measured."""
    rng = _stream(settings, name)
    asked, seen = [], set()
    politeness = ""
    draws = iter(range(MOST_DRAWS))
    while len(asked) < count:
        number = len(asked)
        if number % settings.prompts_per_user == 0:
            politeness = rng.choice(POLITENESS)
        user_id = f"{name}-user-{number // settings.prompts_per_user:04d}"
        side = side_of_user(user_id)
        task = _draw(rng, settings, facts, politeness, side, draws)
        if side != "training" and task.prompt in seen:
            continue
        draws = iter(range(MOST_DRAWS))  # the next prompt has as many
        seen.add(task.prompt)
        asked.append((f"{name}-{number:05d}", user_id, task))
    return asked


def _prompts(
    settings: WorldSettings, facts: list[Fact], name: str, count: int, side_of_user: Callable[[str], Side]
) -> list[Prompt]:
    asked = _asked(settings, facts, name, count, side_of_user)
    return [Prompt(prompt_id, user_id, task.prompt, task.meta) for prompt_id, user_id, task in asked]


def _demonstrations(
    settings: WorldSettings, facts: list[Fact], name: str, count: int, side: Side
) -> list[Demonstration]:
    rng = _stream(settings, f"{name}-answers")
    demonstrations = []
    for prompt_id, user_id, task in _asked(settings, facts, name, count, lambda _: side):
        response = worsen(rng, task.meta, task.answer, settings.demonstrations)
        demonstrations.append(Demonstration(prompt_id, user_id, task.prompt, response, task.meta))
    return demonstrations
