import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from corpus.problems import RunProblem, UsageProblem
from evaluation.results import evaluate, summary, table
from evaluation.schema import read_results, write_results


def test_models_have_the_means_of_their_answers(samples_of):
    samples = samples_of(prompts=10, per_prompt=3)
    results = evaluate(samples, synthetic=True, pretraining_losses={"sft": 1.5})
    rows = [row for row in samples.to_pylist() if row["model"] == "sft"]
    found = results.models["sft"]
    assert found.reward == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
    assert found.gold == pytest.approx(sum(row["gold"] for row in rows) / len(rows))
    assert found.eos_rate == pytest.approx(sum(row["finish_reason"] == "stop" for row in rows) / len(rows))
    assert found.components == pytest.approx({"task": found.gold, "truth": 0.9, "toxicity": 0.02})
    assert found.pretraining_loss == 1.5
    assert results.models["base"].kl is None
    assert (results.prompts, results.samples_per_prompt) == (10, 3)


def test_components_may_be_a_map(samples_of):
    samples = samples_of(prompts=4)
    parts = pa.array(
        [list(row.items()) for row in samples["components"].to_pylist()], pa.map_(pa.string(), pa.float64())
    )
    mapped = samples.set_column(samples.schema.get_field_index("components"), "components", parts)
    assert evaluate(mapped, synthetic=True).models == evaluate(samples, synthetic=True).models


def test_every_answer_meets_every_answer_to_the_same_prompt(samples_of):
    found = evaluate(samples_of(prompts=10, per_prompt=3), synthetic=True).comparison("ppo", "sft", "gold")
    assert found is not None
    assert (found.raw.samples, found.raw.prompts) == (10 * 3 * 3, 10)


def test_the_better_policy_is_found_better_by_both_judges(samples_of):
    results = evaluate(samples_of(), synthetic=True)
    for judge in ("gold", "reward"):
        found = results.comparison("ppo", "sft", judge)
        assert found is not None
        assert found.raw.low > 0.5
        assert found.length_controlled.low > 0.5


def test_a_policy_that_did_not_change_has_not_learned(samples_of):
    samples = samples_of(models=("sft",))
    same = samples.set_column(samples.schema.get_field_index("model"), "model", pa.array(["ppo"] * len(samples)))
    results = evaluate(pa.concat_tables([samples, same]), synthetic=True)
    found = results.comparison("ppo", "sft", "gold")
    assert found is not None
    assert found.raw.rate == 0.5
    assert summary(results)["learned"] is False


def test_without_gold_the_reward_model_judges_and_proves_no_learning(samples_of):
    results = evaluate(samples_of(gold=False, models=("sft", "ppo")), synthetic=False)
    assert {found.judge for found in results.comparisons} == {"reward"}
    assert results.models["ppo"].gold is None
    short = summary(results)
    assert short["judge"] == "reward"
    assert short["learned"] is None
    assert "PPO was trained to raise" in short["verdict"]


def test_only_models_that_are_there_are_compared(samples_of):
    results = evaluate(samples_of(models=("sft", "ppo")), synthetic=True)
    assert {(found.model, found.against) for found in results.comparisons} == {("ppo", "sft")}


def test_side_by_side_keeps_the_first_prompts_and_first_samples(samples_of):
    samples = samples_of(prompts=6, per_prompt=2)
    backwards = samples.sort_by([("sample", "descending")])
    results = evaluate(backwards, synthetic=True, side_by_side=2)
    assert len(results.side_by_side) == 2
    first = pc.and_(pc.equal(samples["model"], "ppo"), pc.equal(samples["sample"], 0))  # pyright: ignore
    texts = samples.filter(first)["response"].to_pylist()
    assert [exchange.answers["ppo"].text for exchange in results.side_by_side] == texts[:2]


def test_a_missing_column_is_named(samples_of):
    with pytest.raises(UsageProblem, match="finish_reason"):
        evaluate(samples_of().drop_columns(["finish_reason"]), synthetic=True)


def test_a_model_without_an_answer_is_named(samples_of):
    samples = samples_of(prompts=5)
    gap = pc.and_(pc.equal(samples["model"], "ppo"), pc.equal(samples["prompt_id"], "p003"))  # pyright: ignore
    with pytest.raises(RunProblem, match=r"ppo has 0 .* p003"):
        evaluate(samples.filter(pc.invert(gap)), synthetic=True)  # pyright: ignore


def test_a_reward_that_is_no_number_is_named(samples_of):
    rows = samples_of(prompts=3, per_prompt=1).to_pylist()
    rows[4]["reward"] = float("nan")
    with pytest.raises(RunProblem, match=f"reward .* {rows[4]['model']}, prompt {rows[4]['prompt_id']}"):
        evaluate(pa.Table.from_pylist(rows), synthetic=True)


def test_an_empty_table_is_refused(samples_of):
    with pytest.raises(UsageProblem, match="no rows"):
        evaluate(samples_of().slice(0, 0), synthetic=True)


def test_results_survive_their_file(results_of, tmp_path: Path):
    results = results_of()
    write_results(results, tmp_path / "eval" / "results.json")
    assert read_results(tmp_path / "eval" / "results.json") == results


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 2}', "[1"])
def test_a_file_that_holds_no_results_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UsageProblem, match="not evaluation results"):
        read_results(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UsageProblem, match="no such file"):
        read_results(tmp_path / "results.json")


def test_the_summary_is_plain_json_with_its_documented_keys(results_of):
    short = summary(results_of(), run="demo", seconds={"ppo": 171.8})
    assert json.loads(json.dumps(short, allow_nan=False)) == short
    documented = summary.__doc__ or ""
    assert all(f"`{key}`" in documented for key in short)
    assert short["learned"] is True
    assert short["win_rates"]["ppo_vs_sft"]["gold"]["raw"]["low"] > 0.5


@pytest.mark.parametrize("gold", [True, False])
def test_table_rows_have_the_same_columns(gold: bool, results_of):
    rows = table(results_of(gold=gold))
    assert [row["model"] for row in rows] == ["base", "sft", "ppo-init", "ppo"]
    assert len({tuple(row) for row in rows}) == 1
    assert ("gold" in rows[0]) == gold
    assert rows[1]["at equal length"] == "–"
    assert "%" in rows[3]["at equal length"]
