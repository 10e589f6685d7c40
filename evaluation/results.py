"""From a table of scored answers to the results of an evaluation, and to their short forms.

The table has one row an answer and the columns of `SAMPLE_COLUMNS`. Everything here is a pure function.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported; a type checker cannot see them)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from corpus.problems import RunProblem, UsageProblem
from evaluation.schema import Answer, Comparison, Judge, ModelResult, Results, RewardModelResult, SideBySide
from evaluation.verdict import verdict
from evaluation.win_rate import WinRate, length_controlled_win_rate, win_rate

SAMPLE_COLUMNS = (
    "prompt_id",
    "prompt",
    "model",
    "sample",
    "response",
    "length",
    "finish_reason",
    "reward",
    "gold",
    "kl",
)
"""Columns of the table of answers: `length` in tokens, `finish_reason` "stop" or "length", `reward` the reward model's
score, `gold` the gold score (null where there is no gold judge), `kl` the answer's log-probability minus the
reference's, in nats (null where not measured). A further column `components` (a struct or map of floats), the parts of
the gold score, may be there."""

PAIRS = (("ppo", "sft"), ("ppo", "ppo-init"), ("sft", "base"))
"""The comparisons made where both models are in the table: each model with what it is measured against."""

SIDE_BY_SIDE_PROMPTS = 8
"""Prompts whose answers are kept for reading: enough to see a pattern, few enough to be read."""


def evaluate(
    samples: pa.Table,
    *,
    synthetic: bool,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    pretraining_losses: Mapping[str, float] | None = None,
    reward_model: RewardModelResult | None = None,
    tie_widths: Mapping[Judge, float] | None = None,
    side_by_side: int = SIDE_BY_SIDE_PROMPTS,
    seed: int = 0,
) -> Results:
    """The results of a table of answers with the columns of `SAMPLE_COLUMNS`.

    Of two models that are compared, every answer of one meets every answer of the other to the same prompt. Judges are
    the gold score, where all answers have one, and the reward model. Of `pairs`, those whose models are both in the
    table are compared. The prompts kept side by side are the table's first, with each model's first sample: not picked.

    pretraining_losses: model name → loss on held-out pretraining text, nats a token.
    tie_widths: judge → largest difference of scores that is a tie, 0 where not given.
    Raises UsageProblem where a column is missing, RunProblem where a model lacks an answer or a score is not finite.
    """
    missing = [name for name in SAMPLE_COLUMNS if name not in samples.column_names]
    if missing:
        raise UsageProblem(f"The table of answers lacks the column(s) {', '.join(missing)}.", "evaluation/answers")
    if samples.num_rows == 0:
        raise UsageProblem("The table of answers has no rows; there is nothing to evaluate.", "evaluation/answers")
    names = list(dict.fromkeys(samples["model"].to_pylist()))
    answers = {name: samples.filter(pc.equal(samples["model"], name)).sort_by("sample") for name in names}
    prompt_ids = list(dict.fromkeys(samples["prompt_id"].to_pylist()))
    per_prompt = _samples_per_prompt(answers, prompt_ids)
    losses = pretraining_losses or {}
    judges: list[Judge] = ["reward"] if samples["gold"].null_count else ["gold", "reward"]
    return Results(
        synthetic=synthetic,
        samples_per_prompt=per_prompt,
        prompts=len(prompt_ids),
        models={name: _means(table, losses.get(name)) for name, table in answers.items()},
        comparisons=[
            _compare(answers, model, against, judge, (tie_widths or {}).get(judge, 0.0), seed)
            for model, against in pairs
            if model in answers and against in answers
            for judge in judges
        ],
        side_by_side=_side_by_side(answers, prompt_ids[:side_by_side]),
        reward_model=reward_model,
    )


def _samples_per_prompt(answers: Mapping[str, pa.Table], prompt_ids: Sequence[str]) -> int:
    """The number of answers that every model gave to every prompt; RunProblem where it is not one number."""
    per_prompt = max(1, next(iter(answers.values())).num_rows // len(prompt_ids))
    for name, table in answers.items():
        counts = {row["values"]: row["counts"] for row in pc.value_counts(table["prompt_id"]).to_pylist()}
        for prompt_id in prompt_ids:
            if counts.get(prompt_id, 0) != per_prompt:
                raise RunProblem(
                    f"Model {name} has {counts.get(prompt_id, 0)} answer(s) to prompt {prompt_id}; every model needs "
                    f"{per_prompt} to every prompt to be compared.",
                    "evaluation/answers",
                )
    return per_prompt


def _means(table: pa.Table, pretraining_loss: float | None) -> ModelResult:
    stopped = pc.equal(table["finish_reason"], "stop")
    return ModelResult(
        gold=_mean(table["gold"]),
        reward=_floats(table, "reward").mean(),
        length=_floats(table, "length").mean(),
        kl=_mean(table["kl"]),
        eos_rate=float(np.mean(stopped.to_pylist())),
        pretraining_loss=pretraining_loss,
        components=_components(table),
    )


def _mean(column: pa.ChunkedArray) -> float | None:
    return None if column.null_count == len(column) else float(pc.mean(column.cast(pa.float64())).as_py())


def _components(table: pa.Table) -> dict[str, float]:
    if "components" not in table.column_names:
        return {}
    values: dict[str, list[float]] = {}
    for row in table["components"].to_pylist():
        for name, value in dict(row or {}).items():
            if value is not None:
                values.setdefault(name, []).append(float(value))
    return {name: float(np.mean(found)) for name, found in values.items()}


def _floats(table: pa.Table, column: str) -> np.ndarray:
    values = np.array([np.nan if value is None else value for value in table[column].to_pylist()], dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        where = f"model {table['model'][row].as_py()}, prompt {table['prompt_id'][row].as_py()}"
        raise RunProblem(f"The {column} of an answer is not a finite number ({where}).", "evaluation/answers")
    return values


def _compare(
    answers: Mapping[str, pa.Table], model: str, against: str, judge: Judge, tie_width: float, seed: int
) -> Comparison:
    rows_a, rows_b, prompt_ids = _meetings(answers[model], answers[against])
    scores_a, scores_b = _floats(answers[model], judge)[rows_a], _floats(answers[against], judge)[rows_b]
    lengths_a, lengths_b = _floats(answers[model], "length")[rows_a], _floats(answers[against], "length")[rows_b]
    return Comparison(
        model=model,
        against=against,
        judge=judge,
        raw=win_rate(scores_a, scores_b, prompt_ids, tie_width, seed=seed),
        length_controlled=length_controlled_win_rate(
            scores_a, scores_b, lengths_a, lengths_b, prompt_ids, tie_width, seed=seed
        ),
    )


def _meetings(a: pa.Table, b: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of A, rows of B and the prompt of every comparison: all answers of A with all of B to the same prompt."""
    rows_b: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(b["prompt_id"].to_pylist()):
        rows_b.setdefault(prompt_id, []).append(row)
    meetings = [
        (row_a, row_b, prompt_id)
        for row_a, prompt_id in enumerate(a["prompt_id"].to_pylist())
        for row_b in rows_b[prompt_id]
    ]
    left, right, prompt_ids = zip(*meetings, strict=True)
    return np.array(left), np.array(right), np.array(prompt_ids)


def _side_by_side(answers: Mapping[str, pa.Table], prompt_ids: Sequence[str]) -> list[SideBySide]:
    first: dict[str, dict[str, dict]] = {name: {} for name in answers}
    for name, table in answers.items():
        for row in table.select(list(SAMPLE_COLUMNS)).to_pylist():  # sorted by sample: the first one stays
            first[name].setdefault(row["prompt_id"], row)
    return [
        SideBySide(
            prompt=next(iter(first.values()))[prompt_id]["prompt"],
            answers={
                name: Answer(
                    text=rows[prompt_id]["response"],
                    reward=rows[prompt_id]["reward"],
                    gold=rows[prompt_id]["gold"],
                    length=rows[prompt_id]["length"],
                )
                for name, rows in first.items()
            },
        )
        for prompt_id in prompt_ids
    ]


def summary(results: Results, *, run: str | None = None, seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The contents of `summary.json`. Its keys:

    - `schema_version`: 1; `run`: the run's name; `synthetic`: whether a program stood in for people;
    - `learned`: true where PPO beats `sft` raw and length-controlled with 95 % intervals above 50 % by the gold judge,
      false where it does not, null where it was not compared or has only the reward model's favour;
    - `verdict`: the same as a sentence with its figures; `judge`: "gold", or "reward" where there is no gold judge;
    - `win_rates`: `"A_vs_B"` → judge → `raw` and `length_controlled`, each `{rate, low, high, samples, prompts}`;
    - `models`: model → `{gold, reward, length, kl, eos_rate, pretraining_loss, components}`;
    - `reward_model`: `{accuracy, heldout_labelers, gold_accuracy, baselines}`, or null;
    - `samples_per_prompt`, `prompts`: the size of the evaluation; `seconds`: stage → seconds, where given.
    """
    found = verdict(results)
    win_rates: dict[str, dict[str, Any]] = {}
    for comparison in results.comparisons:
        by_judge = win_rates.setdefault(f"{comparison.model}_vs_{comparison.against}", {})
        by_judge[comparison.judge] = comparison.model_dump(include={"raw", "length_controlled"})
    return {
        "schema_version": results.schema_version,
        "run": run,
        "synthetic": results.synthetic,
        "learned": found.learned,
        "verdict": found.sentence,
        "judge": found.judge,
        "win_rates": win_rates,
        "models": {name: model.model_dump() for name, model in results.models.items()},
        "reward_model": results.reward_model.model_dump() if results.reward_model else None,
        "samples_per_prompt": results.samples_per_prompt,
        "prompts": results.prompts,
        "seconds": dict(seconds or {}),
    }


def table(results: Results) -> list[dict[str, str]]:
    """One row a model for the terminal, all with the same keys in the same order: column heading → cell.

    Columns: model, gold (with a gold judge), reward, tokens, KL (nats), EOS, pretraining loss, and the win rate against
    `sft` raw and at equal length, with 95 % intervals, by the judge of the verdict. A dash: not measured.
    """
    judge: Judge = verdict(results).judge
    has_gold = any(model.gold is not None for model in results.models.values())
    rows = []
    for name, model in results.models.items():
        versus = results.comparison(name, "sft", judge)
        row = {"model": name}
        if has_gold:
            row["gold"] = _cell(model.gold, ".3f")
        row |= {
            "reward": _cell(model.reward, "+.3f"),
            "tokens": _cell(model.length, ".1f"),
            "KL (nats)": _cell(model.kl, ".2f"),
            "EOS": _cell(model.eos_rate, ".1%"),
            "pretraining loss": _cell(model.pretraining_loss, ".3f"),
            f"wins against sft ({judge})": _percent(versus.raw if versus else None),
            "at equal length": _percent(versus.length_controlled if versus else None),
        }
        rows.append(row)
    return rows


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _percent(rate: WinRate | None) -> str:
    return "–" if rate is None else f"{rate.rate:.1%} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
