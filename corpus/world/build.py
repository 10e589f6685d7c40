"""A whole world from one seed: what the web says, what people ask, how they answer, and who judges."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from pydantic import BaseModel, ConfigDict, Field

from corpus.problems import UsageProblem
from corpus.world.defects import DefectRates, worsen
from corpus.world.facts import Fact, draw_facts
from corpus.world.labelers import Labeler, LabelerSettings, draw_labelers
from corpus.world.tasks import POLITENESS, Task, draw_task
from corpus.world.web import WebSettings, draw_document

MOST_DRAWS = 200_000
"""Instructions drawn, in about 2 s, until one is on the wanted side and new; the default share needs about 8."""


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
    myth_share: float = Field(
        default=0.35, ge=0, le=1, description="Share of facts that have a myth. Chosen for this world."
    )
    demonstrations: DefectRates = Field(default=DefectRates(), description="The mistakes in demonstrations.")
    web: WebSettings = Field(default=WebSettings(), description="What pretraining text is made of.")
    labelers: LabelerSettings = Field(default=LabelerSettings(), description="Who ranks responses.")


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
    """All that a run reads. No user is in two of the lists; held-out instructions are in none of the training text."""

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


def build_world(settings: WorldSettings) -> World:
    """Returns the world of these settings: the same settings always give the same world."""
    facts = draw_facts(_stream(settings, "facts"), settings.myth_share)
    labelers, heldout_labelers = draw_labelers(_stream(settings, "labelers"), settings.labelers)
    return World(
        synthetic=True,
        settings=settings,
        pretraining_train=_documents(settings, facts, "pretraining-train", settings.pretraining_train),
        pretraining_valid=_documents(settings, facts, "pretraining-valid", settings.pretraining_valid),
        demonstrations_train=_demonstrations(settings, facts, "demonstrations-train", settings.demonstrations_train),
        demonstrations_valid=_demonstrations(settings, facts, "demonstrations-valid", settings.demonstrations_valid),
        prompts_collect=_prompts(settings, facts, "collect", settings.prompts_collect),
        prompts_ppo=_prompts(settings, facts, "ppo", settings.prompts_ppo),
        prompts_heldout=_prompts(settings, facts, "heldout", settings.prompts_heldout, heldout=True),
        labelers=labelers,
        heldout_labelers=heldout_labelers,
    )


def _stream(settings: WorldSettings, name: str) -> Random:
    """Each part has its own stream, so that the size of one does not change the others."""
    return Random(f"{settings.seed}/{name}")


def is_heldout(settings: WorldSettings, key: str) -> bool:
    """Returns whether the instructions of this key (`Task.key`) belong to held-out prompts alone."""
    return zlib.crc32(f"{settings.seed}/{key}".encode()) < settings.heldout_share * 2**32


def _draw(
    rng: Random, settings: WorldSettings, facts: list[Fact], politeness: str, heldout: bool, draws: Iterator[int]
) -> Task:
    """The first task on the wanted side. UsageProblem where `draws` ends before: a share so near 0 or 1 leaves none."""
    for _ in draws:
        task = draw_task(rng, facts, politeness)
        if is_heldout(settings, task.key) == heldout:
            return task
    change = f"raise it or lower world.prompts_heldout ({settings.prompts_heldout})" if heldout else "lower it"
    raise UsageProblem(
        f"World.heldout_share {settings.heldout_share:g} leaves too few instructions for "
        f"{'held-out prompts' if heldout else 'training'}: none was found in {MOST_DRAWS:,} draws; {change}.",
        "recipe/world",
    )


def _documents(settings: WorldSettings, facts: list[Fact], name: str, count: int) -> list[str]:
    rng = _stream(settings, name)

    def draw(rng: Random) -> Task:
        return _draw(rng, settings, facts, rng.choice(POLITENESS), heldout=False, draws=iter(range(MOST_DRAWS)))

    return [draw_document(rng, facts, settings.web, draw) for _ in range(count)]


def _asked(
    settings: WorldSettings, facts: list[Fact], name: str, count: int, heldout: bool = False
) -> list[tuple[str, str, Task]]:
    """Returns prompt id, user id and task of `count` instructions; held-out ones are all different."""
    rng = _stream(settings, name)
    asked, seen = [], set()
    politeness = ""
    draws = iter(range(MOST_DRAWS))
    while len(asked) < count:
        number = len(asked)
        if number % settings.prompts_per_user == 0:
            politeness = rng.choice(POLITENESS)
        task = _draw(rng, settings, facts, politeness, heldout, draws)
        if heldout and task.prompt in seen:
            continue
        draws = iter(range(MOST_DRAWS))  # the next prompt has as many
        seen.add(task.prompt)
        user_id = f"{name}-user-{number // settings.prompts_per_user:04d}"
        asked.append((f"{name}-{number:05d}", user_id, task))
    return asked


def _prompts(settings: WorldSettings, facts: list[Fact], name: str, count: int, heldout: bool = False) -> list[Prompt]:
    asked = _asked(settings, facts, name, count, heldout)
    return [Prompt(prompt_id, user_id, task.prompt, task.meta) for prompt_id, user_id, task in asked]


def _demonstrations(settings: WorldSettings, facts: list[Fact], name: str, count: int) -> list[Demonstration]:
    rng = _stream(settings, f"{name}-answers")
    demonstrations = []
    for prompt_id, user_id, task in _asked(settings, facts, name, count):
        response = worsen(rng, task.meta, task.answer, settings.demonstrations)
        demonstrations.append(Demonstration(prompt_id, user_id, task.prompt, response, task.meta))
    return demonstrations
