"""Held-out evaluations of the EMA policy beside the training, and the best policy that they found.

A policy that is the best so far is exported at once, as `best-NNNNNN`, NNNNNN being its update: such a candidate stays
until a checkpoint, or the end of the run, names another, and becomes `best` at the end.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.conductor import HeldOut
from actors.settings import SamplingSettings
from corpus.problems import RunProblem
from learners.answers import Answers, has_come
from learners.metrics import read_metrics
from learners.ppo_publication import snapshot_of
from learners.ppo_settings import PpoSettings


@dataclass
class _Evaluation:
    """A held-out evaluation under way, with the EMA weights it speaks of."""

    update: int
    answer: Any
    weights: dict[str, Tensor]


class BestPolicy:
    """The best policy so far, and the directories of the candidates for it, of which rank 0 alone takes care."""

    def __init__(self, directory: Path, export: Callable[[str, dict[str, Tensor]], None]) -> None:
        """`export` writes weights as a model below `directory`, under the name it is given."""
        self._directory, self._export = directory, export
        self.found: dict[str, float] = {}
        """Its `update` and `objective`; empty before there is one."""

    @property
    def updates(self) -> set[int]:
        """The update of the best policy so far, whose checkpoint is worth keeping; nothing before there is one."""
        return {int(self.found["update"])} if self.found else set()

    def exists(self) -> bool:
        """Whether its weights are there: as a candidate or, once the run is at its end, as `best`."""
        return any((self._directory / name).exists() for name in (_candidate(self.found), "best"))

    def consider(self, update: int, objective: float, weights: dict[str, Tensor]) -> None:
        """Export a policy, and take it for the best, where it is better than the best so far."""
        if not self.found or objective > self.found["objective"]:
            self.found = {"update": update, "objective": objective}
            self._export(_candidate(self.found), weights)

    def forget_others(self) -> None:
        """Remove candidates for the best policy, but for the one that a checkpoint, or the end of the run, names."""
        kept = _candidate(self.found) if self.found else ""
        for path in self._directory.glob("best-*"):
            if path.name != kept:
                shutil.rmtree(path)

    def promote(self) -> None:
        """Make `best` of the best candidate, and forget the others."""
        candidate, best = (self._directory / name for name in (_candidate(self.found), "best"))
        if candidate.exists():  # else the run was interrupted after this very step
            shutil.rmtree(best, ignore_errors=True)
            candidate.rename(best)
        self.forget_others()


class HeldOutEvaluations:
    """Has held-out prompts answered by the EMA policy, and writes evaluations.jsonl; rank 0 alone begins any."""

    def __init__(
        self,
        conductor: Any,
        answers: Answers,
        held_out: HeldOut,
        sampling: SamplingSettings,
        rollout_dtype: str,
        settings: PpoSettings,
        directory: Path,
        export: Callable[[str, dict[str, Tensor]], None],
        check_lease: Callable[[], None],
        tell: Callable[[int, Mapping[str, float | None]], None] = lambda update, figures: None,
    ) -> None:
        """Writes below `directory`, having called `check_lease`; `export` is for `BestPolicy`. `tell` is given the
        figures of each evaluation, with its update, by the names that curves have."""
        self._conductor, self._answers = conductor, answers
        self._held_out, self._sampling, self._rollout_dtype = held_out, sampling, rollout_dtype
        self._settings, self._check_lease, self._tell = settings, check_lease, tell
        self._log = directory / "evaluations.jsonl"
        self._under_way: list[_Evaluation] = []
        self.best = BestPolicy(directory, export)
        self.evaluated = 0
        """Update of the last held-out evaluation that `best` has seen."""

    def begin(self, version: tuple[int, int], average: Mapping[str, Tensor]) -> None:
        """Have the EMA policy of `version` (attempt, update) answer the held-out prompts, beside the training."""
        weights = {name: tensor.clone() for name, tensor in average.items()}
        snapshot = snapshot_of(weights, version, self._rollout_dtype)
        answer = self._conductor.evaluate.remote(snapshot, self._held_out, self._sampling)
        _, update = version
        self._under_way.append(_Evaluation(update, answer, weights))
        self._answers.evaluations = len(self._under_way)

    def is_known(self, update: int) -> bool:
        """Whether the evaluation of `update` was made or is under way."""
        return self.evaluated >= update or any(each.update == update for each in self._under_way)

    def have_come(self, within_s: float = 0.0) -> bool:
        """Whether every evaluation that was begun has come to an end; waits up to `within_s` seconds for each."""
        return all(has_come(each.answer, within_s) for each in self._under_way)

    def collect(self, wait: bool) -> None:
        """Write down the evaluations that are done; keep the EMA policy with the best penalised held-out reward.

        Those that are not done are left for later, or waited for. Raises RunProblem where prompts are not answered, or
        reward or KL is not finite.
        """
        waiting = []
        for evaluation in self._under_way:
            if not wait and not has_come(evaluation.answer):
                waiting.append(evaluation)
                continue
            found = self._answers.of(evaluation.answer, "the conductor to have the held-out prompts answered")
            objective = found["reward"] - self._settings.kl_coefficient * found["kl"]
            if not math.isfinite(objective):  # not written down, so that a run that goes on asks again
                raise RunProblem(
                    f"ppo: the EMA policy of update {evaluation.update} has a held-out reward of {found['reward']} "
                    f"and a KL of {found['kl']} nats; it cannot be compared with others.",
                    "ppo/not-finite",
                )
            self._check_lease()
            line = {"update": evaluation.update, "episodes": evaluation.update * self._settings.batch_size, **found}
            with self._log.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            self._tell(evaluation.update, _curves(found))
            self.evaluated = evaluation.update
            self.best.consider(evaluation.update, objective, evaluation.weights)
        self._under_way = waiting
        self._answers.evaluations = len(waiting)

    def start_anew(self) -> None:
        """Remove what a run of other inputs wrote."""
        self._log.unlink(missing_ok=True)
        self.best.forget_others()

    def state(self) -> dict[str, Any]:
        """What a run needs to go on from here, as plain JSON, beside `tensors`."""
        under_way = [each.update for each in self._open()]
        return {"best": self.best.found, "evaluated": self.evaluated, "under_way": under_way}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The EMA weights of evaluations under way, in groups by name: a run that goes on begins them again."""
        return {_group(each.update): each.weights for each in self._open()}

    def begin_again(self, attempt: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Begin what was under way at the time of `state` and `tensors` under another attempt."""
        for update in state.get("under_way", ()):  # an earlier program's checkpoint has none
            self.begin((attempt, update), tensors[_group(update)])

    def _open(self) -> list[_Evaluation]:
        # one that is written down is still in the list where another, after it, has failed
        return [each for each in self._under_way if each.update > self.evaluated]

    def restore(self, state: Mapping[str, Any], update: int) -> None:
        """Go back to what `state` told after `update`; every rank does."""
        self.best.found, self.evaluated = state["best"], state["evaluated"]
        if self.best.found and not self.best.exists():
            # An older checkpoint than the newest, whose candidate went with it: what comes is compared anew.
            self.best.found, self.evaluated = {}, min(state["evaluated"], update - 1)

    def forget_what_followed(self) -> None:
        """Remove what a lost attempt wrote after the state that was restored: evaluations' lines, and candidates."""
        _drop_after(self._log, self.evaluated)
        self.best.forget_others()


def _group(update: int) -> str:
    return f"held-out-{update:06d}"


def _curves(found: Mapping[str, Any]) -> dict[str, float | None]:
    """An evaluation by the names of curves. √KL is the axis on which proxy and gold are compared (Gao et al. 2022)."""
    return {
        "eval/scores": found["reward"],
        "eval/gold": found["gold"],
        "eval/kl": found["kl"],
        "eval/sqrt_kl": math.sqrt(max(0.0, found["kl"])),
        "eval/length_mean": found["length"],
        "eval/eos_fraction": found["eos_rate"],
    }


def _candidate(best: Mapping[str, float]) -> str:
    return f"best-{int(best['update']):06d}"


def _drop_after(path: Path, update: int) -> None:
    """Take lines of updates after `update`, which a lost attempt wrote, out of evaluations.jsonl."""
    if not path.exists():
        return
    lines = [line for line in read_metrics(path) if line["update"] <= update]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(path)
