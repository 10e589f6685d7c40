import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evaluation.report import SYNTHETIC, build_report
from evaluation.schema import read_results, write_results
from evaluation.style import CONTENT_SECURITY_POLICY

HOSTILE = "</div></style></title><script>alert(1)</script><img src=x onerror=alert(2)>\u202e&lt;b&gt;"
VOID = {"meta", "br", "hr", "col", "img", "link", "input"}
LOADING = {"script", "img", "link", "iframe", "object", "embed", "video", "audio", "source", "image", "use", "form"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; `wrong` lists ends that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if "body" in self.open and data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts)).replace("\u00a0", " ")


def page_of(directory: Path) -> Page:
    return Page(build_report(directory).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(made_up_runs: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the whole synthetic run, as nobody has changed it."""
    return page_of(shutil.copytree(made_up_runs[True], tmp_path_factory.mktemp("whole") / "made-up"))


def test_the_report_is_one_file_that_loads_nothing(run_directory: Path):
    path = build_report(run_directory)
    assert path == run_directory / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.wrong
    assert not page.open
    assert not LOADING & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "poster"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    policies = [attributes for tag, attributes in page.elements if attributes.get("http-equiv")]
    assert [policy["content"] for policy in policies] == [CONTENT_SECURITY_POLICY]
    assert path.stat().st_size < 2_000_000


def test_synthetic_results_are_called_so_in_the_first_line(whole: Page):
    assert whole.texts[0] == SYNTHETIC


def test_synthetic_results_are_called_so_before_there_is_an_evaluation(run_directory: Path):
    shutil.rmtree(run_directory / "round-01")
    assert page_of(run_directory).texts[0] == SYNTHETIC


def test_results_on_real_data_are_not_called_synthetic(real_run_directory: Path):
    assert SYNTHETIC not in page_of(real_run_directory).text
    shutil.rmtree(real_run_directory / "round-01" / "eval")
    assert SYNTHETIC not in page_of(real_run_directory).text


def test_the_headline_has_the_win_rates_with_their_intervals(whole: Page, made_up_runs: dict[bool, Path]):
    results = read_results(made_up_runs[True] / "round-01" / "eval" / "results.json")
    text = whole.text
    assert "Yes, PPO learned" in text
    for against in ("sft", "ppo-init"):
        found = results.comparison("ppo", against, "gold")
        assert found is not None
        for rate in (found.raw, found.length_controlled):
            assert f"{100 * rate.rate:.1f} % (95 % interval {100 * rate.low:.1f}–{100 * rate.high:.1f})" in text
            assert f"{100 * rate.rate:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" in text


def test_the_same_prompts_are_answered_by_base_sft_and_ppo(whole: Page, made_up_runs: dict[bool, Path]):
    results = read_results(made_up_runs[True] / "round-01" / "eval" / "results.json")
    text = whole.text
    for exchange in results.side_by_side:
        for name in ("base", "sft", "ppo"):
            answer = exchange.answers[name]
            assert re.sub(r"\s+", " ", answer.text).strip() in text
            assert f"RM {answer.reward:+.2f}".replace("-", "−") in text


def test_gold_and_proxy_are_drawn_over_the_distance(whole: Page):
    section = whole.text.partition("Reward against the distance travelled")[2]
    for words in ("Gold score What is wanted", "Reward model's score The proxy that PPO raises", "√KL (√nats)"):
        assert words in section


def test_every_part_is_there(whole: Page):
    identifiers = {attributes.get("id") for _, attributes in whole.elements}
    parts = {"verdict", "answers", "models", "frontier", "reward-model", "curves", "made", "reproduce", "words"}
    assert parts <= identifiers
    links = {attributes["href"] for tag, attributes in whole.elements if tag == "a"}
    assert links == {f"#{name}" for name in parts - {"verdict"}}
    titles = {attributes.get("title") for _, attributes in whole.elements}
    assert {
        "loss, valid/loss",
        "valid/accuracy",
        "objective/kl",
        "stream/accepted_waiting, stream/regenerated",
    } <= titles
    assert {"val/explained_variance", "time/generate, time/learn, time/score", "custom/unknown_metric"} <= titles
    for words in ("bag of words", "76.4 %", "2.60.0", "kl_coefficient: 0.05", "2 min 52 s", "amenable run made-up/"):
        assert words in whole.text
    assert "not run" not in whole.text
    assert "Not recorded" not in whole.text


def test_hostile_text_stays_text_wherever_it_comes_from(run_directory: Path):
    first = run_directory / "round-01"
    results = read_results(first / "eval" / "results.json")
    raw = json.loads(results.model_dump_json())
    raw["side_by_side"][0]["prompt"] = HOSTILE
    raw["side_by_side"][0]["answers"]["ppo"]["text"] = HOSTILE
    raw["models"][HOSTILE] = raw["models"]["sft"]
    raw["comparisons"][0]["model"] = HOSTILE
    raw["models"]["sft"]["components"] = {HOSTILE: 0.5}
    raw["reward_model"]["baselines"] = {HOSTILE: raw["reward_model"]["accuracy"]}
    write_results(type(results).model_validate(raw), first / "eval" / "results.json")
    samples = pq.read_table(first / "eval" / "samples.parquet")
    index = samples.schema.get_field_index("model")
    pq.write_table(samples.set_column(index, "model", [[HOSTILE] * len(samples)]), first / "eval" / "samples.parquet")
    (run_directory / "recipe.yaml").write_text(f"seed: 1\nname: {json.dumps(HOSTILE)}\n# {HOSTILE}\n")
    (first / "select-sft" / "selection.json").write_text(HOSTILE)
    (run_directory / "lineage.json").write_text(
        json.dumps(
            {
                "run": HOSTILE,
                "created": HOSTILE,
                "versions": {HOSTILE: HOSTILE},
                "data": {HOSTILE: HOSTILE},
                "data_sets": {HOSTILE: {"licence": HOSTILE, "licence_from": HOSTILE, "commit": HOSTILE}},
                "models": {HOSTILE: {HOSTILE: HOSTILE}},
                "stages": {HOSTILE: {"hash": HOSTILE, "parents": {HOSTILE: HOSTILE}, "seconds": 1.0}},
            }
        )
    )
    metrics = first / "ppo" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + json.dumps({"step": 49, HOSTILE: 1.0, f"time/{HOSTILE}": 2.0}) + "\n")
    page = page_of(run_directory)
    assert not page.wrong
    assert not page.open
    assert not LOADING & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert "\u202e" not in page.text


def test_the_licence_of_each_data_set_stands_with_who_states_it(run_directory: Path):
    text = " ".join(page_of(run_directory).text.split())
    for row in (
        "hh MIT recipe –",
        f"hub:some/texts cc-by-4.0 Hugging Face Hub {'c0ffee' * 2}",
        "mine.jsonl not stated – –",
    ):
        assert row in text
    lineage = json.loads((run_directory / "lineage.json").read_text())
    del lineage["data_sets"]  # as runs of before have it
    (run_directory / "lineage.json").write_text(json.dumps(lineage))
    assert "mine.jsonl" not in page_of(run_directory).text


def test_answers_without_words_are_said_to_be_empty(run_directory: Path):
    path = run_directory / "round-01" / "eval" / "results.json"
    raw = json.loads(path.read_text())
    raw["side_by_side"][0]["answers"]["ppo"]["text"] = ""
    raw["side_by_side"][1]["answers"]["ppo"]["text"] = " \n"
    path.write_text(json.dumps(raw))
    text = page_of(run_directory).text
    assert "(an empty answer)" in text
    assert "(only white space)" in text


def test_without_gold_and_base_the_report_says_so(real_run_directory: Path):
    text = page_of(real_run_directory).text
    assert "It learned to please the reward model" in text
    assert "There is no gold judge in this run" in text
    assert "Not in this run: answers of Base." in text
    assert "Not measured in this run: Gold score." in text
    assert "base not run" in text


def test_an_unfinished_run_shows_what_there_is(run_directory: Path):
    shutil.rmtree(run_directory / "round-01" / "eval")
    (run_directory / "round-01" / "ppo" / "stage.json").unlink()
    metrics = run_directory / "round-01" / "ppo" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:5000])
    text = page_of(run_directory).text
    assert "Not known yet" in text
    assert "Unfinished: round-01/ppo." in text
    assert "Reward against the distance travelled" in text
    assert "round-01/ppo (unfinished)" in text


def test_an_empty_run_directory_has_a_report_of_what_is_missing(tmp_path: Path):
    text = page_of(tmp_path).text
    for missing in ("not been evaluated", "recipe.yaml is not", "lineage.json is not", "No metrics were recorded"):
        assert missing in text


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("round-01/ppo/evaluations.jsonl", "PPO recorded no evaluations"),
        ("round-01/rm/metrics.jsonl", "No metrics were recorded by: round-01/rm."),
        ("round-01/eval/samples.parquet", "there are no lengths to draw"),
        ("lineage.json", "no versions, data or hashes"),
        ("recipe.yaml", "cannot be repeated from its directory"),
    ],
)
def test_a_missing_file_is_said(gone: str, words: str, whole: Page, run_directory: Path):
    assert words not in whole.text
    (run_directory / gone).unlink()
    assert words in page_of(run_directory).text


def test_a_metric_that_was_not_recorded_is_named(run_directory: Path):
    metrics = run_directory / "round-01" / "ppo" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("objective/kl_coefficient", "objective/other"))
    text = page_of(run_directory).text
    assert "Not recorded by this stage: KL coefficient (objective/kl_coefficient)." in text
    assert "objective/other" in text


def test_without_accuracy_of_the_reward_model_the_report_says_so(run_directory: Path):
    path = run_directory / "round-01" / "eval" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "reward_model": None}))
    assert "accuracy of the reward model was not measured" in page_of(run_directory).text


def test_of_several_rounds_the_last_evaluated_is_the_headline(run_directory: Path):
    shutil.copytree(run_directory / "round-01", run_directory / "round-02")
    shutil.rmtree(run_directory / "round-02" / "eval")
    text = page_of(run_directory).text
    assert "Yes, PPO learned" in text
    assert "round-02/eval not run" in text
    shutil.copytree(run_directory / "round-01" / "eval", run_directory / "round-02" / "eval")
    assert "round-01: On 60 held-out prompts" in page_of(run_directory).text


def test_the_evaluation_room_needs_neither_torch_nor_ray():
    code = "import sys, evaluation.report, evaluation.results; print({'torch', 'ray', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_what_is_no_text_in_a_damaged_run_does_not_stop_its_report(run_directory: Path):
    lineage = json.loads((run_directory / "lineage.json").read_text())
    (run_directory / "lineage.json").write_text(json.dumps(lineage | {"run": "half \ud83d", "versions": 3}))
    (run_directory / "recipe.yaml").write_text("seed: 2026-01-01\n")
    page = build_report(run_directory).read_text()
    assert r"half \ud83d" in page
    assert "Versions were not recorded" in page
    assert "2026-01-01" in page


def test_a_baseline_that_was_left_out_is_named_with_its_reason(run_directory: Path):
    path = run_directory / "round-01" / "eval" / "results.json"
    results = json.loads(path.read_text())
    results["reward_model"] |= {"baselines": {}, "baselines_left_out": {"bag_of_words": "too few words."}}
    path.write_text(json.dumps(results))
    page = build_report(run_directory).read_text()
    assert "Baseline left out: bag of words: too few words." in page
    assert "simpler baselines" not in page


def test_the_data_section_says_what_the_limits_of_length_took(run_directory: Path):
    assert "prompt too long" not in page_of(run_directory).text
    values = {"comparisons-train": 1198, "comparisons-train-long-prompts": 236, "prompts-ppo": 4000, "vocabulary": "x"}
    (run_directory / "data").mkdir(exist_ok=True)
    (run_directory / "data" / "stage.json").write_text(json.dumps({"values": {**values, "prompts-left-out": 3}}))
    text = page_of(run_directory).text
    assert "Left out: prompt too long" in text
    assert "comparisons-train 1,198 236 prompts-ppo 4,000 0" in " ".join(text.split())
    assert "Responses cut" not in text
    assert "because their prompt is held out: 3 of prompts." in text


def test_the_data_section_says_which_models_were_given(run_directory: Path):
    lineage = json.loads((run_directory / "lineage.json").read_text())
    lineage["models"] = {"a/judge": {"commit on the Hub": "c0ffee"}, "my/base": {"config.json": "ef" * 32}}
    (run_directory / "lineage.json").write_text(json.dumps(lineage))
    text = " ".join(page_of(run_directory).text.split())
    assert "a/judge: commit on the Hub c0ffee" in text
    assert f"my/base: config.json {'ef' * 32}" in text
