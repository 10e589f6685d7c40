"""What the page shows of a run's own files: held-out prompts, the curves so far, a prompt as models are given it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from corpus.problems import RunProblem, UsageProblem
from corpus.schemas import read_table
from evaluation.curves import LANGUAGE_MODEL, PPO, REWARD_MODEL, Group, Panel
from evaluation.figures import Series, thin
from evaluation.run_files import Curve, read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_OFFERED = 200
"""Held-out prompts that the page offers to pick from, the first of their file. House default."""

POINTS = 120
"""Points of a curve that is sent to the page; longer ones are means of neighbouring steps. House default."""

_SHOWN: dict[str, tuple[tuple[Group, ...], str]] = {
    "ppo": (PPO[:2], "update"),
    "rm": (tuple(Group("", group.panels[:2]) for group in REWARD_MODEL), "step"),
    "sft": (tuple(Group("", group.panels[:1]) for group in LANGUAGE_MODEL), "step"),
}
"""Stages and panels of the page, the one that matters most first; the report draws all of them."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class HeldOutPrompt(_Answer):
    """A prompt that no stage has trained on."""

    id: str = Field(description="Its id in the run's data.")
    prompt: str = Field(description="Its text.")


class HeldOutPrompts(_Answer):
    """Prompts to pick from."""

    total: int = Field(ge=0, description="How many the run has.")
    prompts: list[HeldOutPrompt] = Field(description="The first of them.")


class DrawnCurve(_Answer):
    """One curve: as many steps as values."""

    name: str = Field(description="Its short name.")
    x: list[float] = Field(description="Steps.")
    y: list[float] = Field(description="Values.")


class DrawnPanel(_Answer):
    """Curves that share a unit, and what they tell."""

    title: str = Field(description="Heading.")
    explanation: str = Field(description="What it tells its reader, with the unit.")
    reference: float | None = Field(description="A level to compare with; null where there is none.")
    curves: list[DrawnCurve] = Field(description="At least one.")


class DrawnStage(_Answer):
    """The curves of one stage."""

    name: str = Field(description="The stage's directory in the run: round-01/ppo.")
    x: str = Field(description="What the steps are: update or step.")
    finished: bool = Field(description="Whether the stage is complete.")
    panels: list[DrawnPanel] = Field(description="Those of which something was recorded.")


class EncodedPrompt(_Answer):
    """A prompt as the models are given it."""

    tokens: list[int] = Field(description="Token ids, the chat template's special tokens among them.")


@dataclass
class PageRun:
    """The run that a page is about. `directory` is local; what is asked for often is kept until its file changes."""

    directory: Path
    name: str
    send: Callable[[Path], None] = lambda path: None
    """Brings a file that was made in `directory` to where the run is kept."""
    _curves: dict[Path, tuple[tuple[int, int], dict[str, Curve]]] = field(default_factory=dict)
    _loading: Lock = field(default_factory=Lock)

    async def prompts(self) -> HeldOutPrompts:
        """Held-out prompts to pick from; none where the run has no such file yet. Raises UsageProblem where the file is
        not what its name says."""
        return await asyncio.to_thread(lambda: self._prompts)

    @cached_property
    def _prompts(self) -> HeldOutPrompts:
        path = self.directory / "data" / "prompts-heldout.parquet"
        if not path.exists():
            return HeldOutPrompts(total=0, prompts=[])
        table = read_table(path, "prompts")
        rows = table.select(["prompt_id", "prompt"]).slice(0, PROMPTS_OFFERED).to_pylist()
        return HeldOutPrompts(
            total=table.num_rows, prompts=[HeldOutPrompt(id=row["prompt_id"], prompt=row["prompt"]) for row in rows]
        )

    async def curves(self) -> list[DrawnStage]:
        """The curves so far, stages of the newest round first; empty before anything was recorded. Raises UsageProblem
        for a damaged file."""
        return await asyncio.to_thread(self._drawn_stages)

    def _drawn_stages(self) -> list[DrawnStage]:
        rounds = sorted(self.directory.glob("round-[0-9]*"), reverse=True)[:1]
        stages = [(kind, one / kind) for kind in ("ppo", "rm") for one in rounds] + [("sft", self.directory / "sft")]
        drawn = []
        for kind, directory in stages:
            groups, x = _SHOWN[kind]
            metrics = self._metrics(directory / "metrics.jsonl")
            panels = [_drawn(panel, metrics) for group in groups for panel in group.panels]
            if any(panels):
                drawn.append(
                    DrawnStage(
                        name=directory.relative_to(self.directory).as_posix(),
                        x=x,
                        finished=(directory / "stage.json").exists(),
                        panels=[panel for panel in panels if panel is not None],
                    )
                )
        return drawn

    def _metrics(self, path: Path) -> dict[str, Curve]:
        try:
            found = path.stat()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UsageProblem(f"{path}: cannot be read ({error.strerror or error}).", "run/damaged") from error
        state = (found.st_mtime_ns, found.st_size)
        if path not in self._curves or self._curves[path][0] != state:
            self._curves[path] = (state, read_metrics(path))
        return self._curves[path][1]

    def warm(self) -> None:
        """Reads what a visit begins with, so that the first one need not wait for it: tokenizer (seconds where
        transformers is not yet imported), held-out prompts, curves. Raises as `encode`, `prompts` and `curves` do."""
        self._encode("warm")
        _ = self._prompts
        self._drawn_stages()

    async def encode(self, prompt: str) -> EncodedPrompt:
        """`prompt` (a plain request or a dialogue) as token ids, by the same template and rules as in training.

        Raises UsageProblem where the chat template refuses it, RunProblem where the run's tokenizer does not load.
        """
        return await asyncio.to_thread(self._encode, prompt)

    def _encode(self, prompt: str) -> EncodedPrompt:
        from corpus.templates import encode_prompt

        with self._loading:  # a fast tokenizer is not made for several threads, and one load is enough
            return EncodedPrompt(tokens=encode_prompt(self._tokenizer, prompt))

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        directory = self.directory / "data" / "tokenizer"
        try:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise RunProblem(f"{directory}: the run's tokenizer does not load ({said}).", "model/tokenizer") from error


def _drawn(panel: Panel, metrics: dict[str, Curve]) -> DrawnPanel | None:
    curves: list[DrawnCurve] = []
    for metric, name in panel.metrics:
        if metric in metrics:
            thinned = thin(Series(name, *metrics[metric], ""), POINTS)
            if len(thinned.x):
                curves.append(DrawnCurve(name=name, x=list(thinned.x), y=list(thinned.y)))
    if not curves:
        return None
    return DrawnPanel(title=panel.title, explanation=panel.explanation, reference=panel.reference, curves=curves)


def describe(run: PageRun) -> dict[str, Any]:
    """What the page says of the run in its head: its name, and whether a program stood in for people."""
    from evaluation.damaged_files import read_text, yaml_mapping

    path = run.directory / "recipe.yaml"
    recipe = yaml_mapping(path, read_text(path) or "")
    return {"run": run.name, "synthetic": "corpus" in recipe and recipe["corpus"] is None}
