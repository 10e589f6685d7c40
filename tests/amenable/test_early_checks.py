"""What is wrong and can be known beforehand is told before anything is started or written."""

import json
import socket
from pathlib import Path

import pytest

from amenable.early_checks import check_early, check_variables
from amenable.pipeline import models_read, run_pipeline, score_comparisons, stages_of
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe, packaged_recipes
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import StageSpec, begin, complete
from amenable.stages.data import source_hashes
from amenable.stages.sources import COMMIT, directory_hashes, model_hashes, reward_hashes
from cluster.under_job import JOB_CONFIG
from corpus.hub import HubCard
from corpus.problems import UsageProblem


def recipe(tmp_path: Path, **settings) -> Recipe:
    return Recipe.model_validate({"name": "early", "run_directory": tmp_path / "run", **settings})


@pytest.mark.parametrize(
    ("workers", "learner_gpus", "generator_gpus"), [(1, 0, 0), (2, 0.5, 0.5), (1, 0.5, 0), (1, 1, 1), (1, 0.5, 0.5)]
)
def test_ipc_is_for_a_learner_that_shares_its_gpu(tmp_path, workers, learner_gpus, generator_gpus):
    settings = {
        "learners": {"workers": workers, "gpus": learner_gpus},
        "rollouts": {"transport": "ipc", "gpus": generator_gpus},
    }
    asked = recipe(tmp_path, **settings)
    if (workers, learner_gpus, generator_gpus) == (1, 0.5, 0.5):
        check_early(asked, "10.0.0.1:6379")
        return
    with pytest.raises(UsageProblem, match=r"shares a GPU with the generators.*use object_store"):
        check_early(asked, "10.0.0.1:6379")
    settings["rollouts"]["transport"] = "auto"
    check_early(recipe(tmp_path, **settings), "10.0.0.1:6379")


@pytest.mark.parametrize(
    ("rollouts", "says"),
    [
        ({"gpus": 0.5}, r"gpus 0.5 of each generator is not tensor_parallel 2.*give rollouts.gpus=2"),
        ({"gpus": 1}, "gpus 1 of each generator is not tensor_parallel 2"),
        ({"gpus": 2, "transport": "ipc"}, "use object_store"),
        ({"threads": 1}, "give rollouts.threads=2 or more"),
        ({"threads": 2, "dtype": "bfloat16"}, "use float32"),
    ],
)
def test_a_divided_generator_has_whole_gpus_or_a_cpu_for_each_part(tmp_path, rollouts, says):
    with pytest.raises(ValueError, match=says):
        recipe(tmp_path, rollouts={"tensor_parallel": 2, **rollouts})
    recipe(tmp_path, rollouts={**rollouts, "tensor_parallel": 1})


def test_a_divided_generator_may_be_on_gpus_or_on_cpus(tmp_path):
    check_early(recipe(tmp_path, rollouts={"tensor_parallel": 2, "gpus": 2, "dtype": "bfloat16"}), "10.0.0.1:6379")
    check_early(recipe(tmp_path, rollouts={"tensor_parallel": 2, "threads": 2}))


@pytest.mark.parametrize(
    ("shape", "ranks", "says"),
    [
        ({"heads": 4}, 3, "4 attention heads do not divide by 3; 2 would do"),
        ({"heads": 12, "hidden_size": 384, "key_value_heads": 3}, 2, "3 key-value heads neither divide by 2 nor"),
        ({"heads": 4, "mlp_size": 250}, 4, "the width of its MLP, 250, does not divide by 4; 2 would do"),
        ({"heads": 4, "key_value_heads": 2}, 4, ""),
    ],
)
def test_a_small_model_that_does_not_divide_is_told(tmp_path, shape, ranks, says):
    asked = recipe(
        tmp_path, model={"shape": shape}, rollouts={"tensor_parallel": ranks, "threads": ranks, "generators": 1}
    )
    if not says:
        check_early(asked)
        return
    with pytest.raises(UsageProblem, match=rf"The small model of model.shape cannot be divided.*{says}"):
        check_early(asked)


def test_a_base_model_that_does_not_divide_is_told(tmp_path, model):
    check_early(recipe(tmp_path, model={"base": str(model)}, rollouts={"tensor_parallel": 2, "threads": 2}))
    with pytest.raises(UsageProblem, match=r"its 2 attention heads do not divide by 4; 2 would do"):
        check_early(recipe(tmp_path, model={"base": str(model)}, rollouts={"tensor_parallel": 4, "threads": 4}))


def reads_of(settings: Recipe) -> dict[str, dict]:
    stages = stages_of(settings, RunDirectory(settings.run_directory))
    return {stage.name: stage.spec.reads for stage in stages}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a tiny causal language model and its tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from models.build import tiny_llama
    from models.export import export_causal_lm
    from models.settings import TinyLlamaSettings

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    shape = TinyLlamaSettings(hidden_size=16, layers=1, heads=2, mlp_size=16, context_length=4096)
    network = tiny_llama(shape, len(words), pad_id=0, bos_id=None, eos_id=1, seed=0)
    export_causal_lm(tmp_path / "model", network, dict(network.named_parameters()), tokenizer, max_new_tokens=8)
    return tmp_path / "model"


def test_packaged_recipes_pass_but_for_the_data_they_ask_for(tmp_path, monkeypatch):
    monkeypatch.setattr("amenable.early_checks._has_gpu", lambda: True)
    for one in packaged_recipes():
        settings = load_recipe(one.name, [f"run_directory={json.dumps(str(tmp_path / one.name))}"], Recipe)
        check_early(settings.model_copy(update={"corpus": None}))


@pytest.mark.parametrize("stage", ["sft", "ppo_init"])
def test_a_context_shorter_than_a_demonstration_may_be_is_refused(tmp_path, stage):
    tokens = {"max_prompt_tokens": 40, "max_response_tokens": 32, "context_tokens": 72}
    short = recipe(tmp_path, tokens=tokens, sampling={"max_response_tokens": 24}, **{stage: {"context_length": 71}})
    with pytest.raises(UsageProblem, match=rf"{stage}.context_length 71 is less than .* 72"):
        check_early(short)
    check_early(
        recipe(tmp_path, tokens=tokens, sampling={"max_response_tokens": 24}, **{stage: {"context_length": 72}})
    )


@pytest.mark.parametrize("stage", ["base", "sft", "ppo_init"])
def test_a_context_longer_than_the_small_model_reads_is_refused(tmp_path, stage):
    tokens = {"max_prompt_tokens": 40, "max_response_tokens": 32, "context_tokens": 72}
    given: dict = {
        "tokens": tokens,
        "sampling": {"max_response_tokens": 24},
        "model": {"shape": {"context_length": 80}},
    }
    fits = {name: {"context_length": 80} for name in ("base", "sft", "ppo_init")}
    check_early(recipe(tmp_path, **given, **fits))
    with pytest.raises(UsageProblem, match=rf"{stage}.context_length 81 is more than model.shape.context_length 80"):
        check_early(recipe(tmp_path, **given, **{**fits, stage: {"context_length": 81}}))


@pytest.mark.parametrize("stage", ["sft", "ppo_init"])
def test_a_context_longer_than_the_base_model_reads_is_refused(tmp_path, model, stage):
    check_early(recipe(tmp_path, model={"base": str(model)}, **{stage: {"context_length": 4096}}))
    with pytest.raises(UsageProblem, match="reads at most 4096 tokens; the recipe asks for 4097"):
        check_early(recipe(tmp_path, model={"base": str(model)}, **{stage: {"context_length": 4097}}))


def test_a_corpus_that_is_not_there_is_told_before_the_run_has_a_directory(tmp_path):
    missing = recipe(tmp_path, corpus={"path": str(tmp_path / "nothing.jsonl")})
    with pytest.raises(UsageProblem, match=r"nothing\.jsonl"):
        run_pipeline(missing, until=None, progress=Progress(json=True), address=None)
    assert not (tmp_path / "run").exists()


def test_a_base_model_without_whole_weights_is_told(tmp_path, model):
    base = recipe(tmp_path, model={"base": str(model)})
    check_early(base)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageProblem, match=r"model\.safetensors is damaged"):
        check_early(base)
    weights.unlink()
    with pytest.raises(UsageProblem, match=r"no \.safetensors file"):
        check_early(base)


def test_a_base_model_with_another_context_or_vocabulary_is_told(tmp_path, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    with pytest.raises(UsageProblem, match="reads at most 100 tokens"):
        check_early(recipe(tmp_path, model={"base": str(model)}))
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 3}))
    with pytest.raises(UsageProblem, match="rows for 3"):
        check_early(recipe(tmp_path, model={"base": str(model)}))


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ({"kind": "function", "function": "no_such_module:f"}, "cannot be imported"),
        ({"kind": "function", "function": "json:no_such_function"}, "no function no_such_function"),
        ({"kind": "http", "url": "ftp://somewhere"}, "http:// or https://"),
        ({"kind": "http", "url": "http://"}, "should name a host"),
        ({"kind": "http", "url": "http://:80/score"}, "should name a host"),
        ({"kind": "http", "url": "http://localhost:99999"}, "no web address"),
        ({"kind": "huggingface", "model": "./no-such-model"}, "does not exist"),
    ],
)
def test_a_reward_that_cannot_serve_is_told(tmp_path, reward, says):
    with pytest.raises(UsageProblem, match=says):
        check_early(recipe(tmp_path, reward=reward))


def test_a_reward_model_with_two_labels_is_told(tmp_path, model):
    config = json.loads((model / "config.json").read_text())
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (model / "config.json").write_text(json.dumps({**config, **labels}))
    with pytest.raises(UsageProblem, match="2 numbers; a reward is one"):
        check_early(recipe(tmp_path, reward={"kind": "huggingface", "model": str(model)}))


def test_another_content_of_a_base_model_changes_what_the_data_stage_reads(tmp_path, model):
    base = recipe(tmp_path, model={"base": str(model)})
    before = reads_of(base)["data"]
    assert reads_of(base)["data"] == before
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + " ")
    assert reads_of(base)["data"] != before
    assert directory_hashes("a/name-on-the-hub") == {}


def test_another_commit_of_a_model_on_the_hub_changes_what_is_read_of_it_and_lineage_has_it(tmp_path, monkeypatch):
    commits = {"a/base": "c0ffee", "a/judge": "decade"}
    monkeypatch.setattr("corpus.hub.model_commit", commits.get)
    asked = recipe(tmp_path, model={"base": "a/base"}, reward={"kind": "huggingface", "model": "a/judge"})
    before = reads_of(asked)
    stages = stages_of(asked, RunDirectory(asked.run_directory))
    assert models_read(asked, stages) == {"a/base": {COMMIT: "c0ffee"}, "a/judge": {COMMIT: "decade"}}
    assert reads_of(asked) == before
    commits["a/judge"] = "facade"
    changed = reads_of(asked)
    assert {name for name in before if before[name] != changed[name]} == {"select-sft", "ppo", "eval"}
    commits["a/base"] = "facade"
    assert reads_of(asked)["data"] != before["data"]
    commits.clear()
    assert model_hashes("a/base") == {}
    assert models_read(recipe(tmp_path), stages_of(recipe(tmp_path), RunDirectory(asked.run_directory))) == {}


def test_another_commit_of_a_data_set_on_the_hub_makes_the_data_again_and_a_hub_that_is_away_does_not(
    tmp_path, monkeypatch
):
    cards = {"a/texts": HubCard("c0ffee")}
    monkeypatch.setattr("corpus.hub.hub_card", lambda name: cards.get(name, HubCard(why="no answer")))
    asked = recipe(tmp_path, corpus={"path": "hub:a/texts:test"})
    assert source_hashes(asked) == {"hub:a/texts:test": "commit c0ffee"}
    before = reads_of(asked)["data"]
    cards["a/texts"] = HubCard("decade")
    assert reads_of(asked)["data"] != before
    cards.clear()
    assert source_hashes(asked) == {"hub:a/texts:test": "commit not told"}
    spec = StageSpec("data", RunDirectory(asked.run_directory).data, before)
    begin(spec)
    complete(spec, [], 1.0, {})
    assert reads_of(asked)["data"] == before


def test_another_content_of_a_reward_function_changes_what_ppo_reads_and_nothing_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    (tmp_path / "brevity_of_early.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    rewarded = recipe(tmp_path, reward={"kind": "function", "function": "brevity_of_early:score"})
    assert list(reward_hashes(rewarded.reward)) == ["brevity_of_early.py"]
    before = reads_of(rewarded)
    (tmp_path / "brevity_of_early.py").write_text("def score(prompts, responses):\n    return [1.0] * len(responses)\n")
    after = reads_of(rewarded)
    assert {name for name in before if before[name] != after[name]} == {"select-sft", "ppo", "eval"}


def test_a_reward_service_that_refuses_or_is_not_known_is_told_and_one_that_answers_passes(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.socket() as service:
        service.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{service.getsockname()[1]}/score"
        served = recipe(tmp_path, reward={"kind": "http", "url": url})
        with pytest.raises(UsageProblem, match=rf"^reward service {url}: nobody answers at 127.0.0.1:\d+ \(.*refused"):
            check_early(served)
        check_early(served, "10.0.0.7:6379")  # a cluster's machines may reach what this one does not
        service.listen()
        check_early(served)
    with pytest.raises(UsageProblem, match=r"nobody answers at nowhere\.invalid:80"):
        check_early(recipe(tmp_path, reward={"kind": "http", "url": "http://nowhere.invalid/score"}))


def test_a_reward_service_that_is_slow_is_left_to_the_run(tmp_path, monkeypatch):
    def late(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", late)
    check_early(recipe(tmp_path, reward={"kind": "http", "url": "http://10.0.0.7/score"}))


def test_gpus_that_this_machine_lacks_are_told_at_once_and_a_cluster_may_have_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    asks = recipe(tmp_path, learners={"gpus": 1}, scoring={"gpus": 0.5})
    with pytest.raises(UsageProblem, match=r"asks for GPUs \(learners\.gpus 1, scoring\.gpus 0\.5\).* has none"):
        check_early(asks)
    check_early(asks, "auto")
    check_early(recipe(tmp_path))
    monkeypatch.setattr("amenable.early_checks._has_gpu", lambda: True)
    check_early(asks)


@pytest.mark.parametrize("role", ["learners", "rollouts", "scoring"])
def test_labels_that_a_session_of_one_machine_lacks_are_told_at_once_and_a_cluster_may_have_them(tmp_path, role):
    asks = recipe(tmp_path, **{role: {"node_labels": {"pool": "spot", "zone": "a"}}})
    with pytest.raises(UsageProblem, match=rf"{role}\.node_labels asks for nodes with pool=spot, zone=a, and"):
        check_early(asks)
    check_early(asks, "auto")


@pytest.mark.parametrize(
    "address", ["garbage", "10.0.0.7", "http://10.0.0.7:80", "a b:6379", "host:99999", ":6379", ""]
)
def test_an_address_that_is_none_of_a_cluster_is_told_before_the_run_has_a_directory(tmp_path, address):
    with pytest.raises(UsageProblem, match="is no address of a Ray cluster; give HOST:PORT"):
        run_pipeline(recipe(tmp_path), until=None, progress=Progress(json=True), address=address)
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_a_source_of_comparisons_or_without_what_reads_the_hub_is_told(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    rows = str(tmp_path / "rows.jsonl")
    with pytest.raises(UsageProblem, match=r"no source for its comparisons: give corpus\.path or corpus\.comparisons"):
        check_early(recipe(tmp_path, corpus={"pretraining": rows, "demonstrations": rows, "prompts": rows}))
    check_early(recipe(tmp_path, corpus={"path": rows}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "datasets" else object())
    with pytest.raises(UsageProblem, match=r"hub:some/data: reading from the Hub needs the `datasets` package"):
        check_early(recipe(tmp_path, corpus={"path": "hub:some/data"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_early(recipe(tmp_path, corpus={"path": "hub:some/data"}))


def test_files_of_one_name_are_told_apart_and_an_edit_of_either_is_noticed(tmp_path):
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "train.jsonl").write_text("{}\n")
    paths = [str(tmp_path / directory / "train.jsonl") for directory in ("a", "b")]
    two = recipe(tmp_path, corpus={"path": paths[0], "comparisons": paths[1]})
    hashes = source_hashes(two)
    assert list(hashes) == paths
    (tmp_path / "a" / "train.jsonl").write_text('{"edited": 1}\n')
    assert {path for path in paths if source_hashes(two)[path] != hashes[path]} == {paths[0]}


def test_a_source_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("amenable.stages.data._sha256", refuse)
    with pytest.raises(UsageProblem, match=r"^/.*/rows\.jsonl: cannot be read \(.*Permission denied\)\.$"):
        source_hashes(recipe(tmp_path, corpus={"path": str(tmp_path / "rows.jsonl")}))


def trained(tmp_path) -> Recipe:
    """A recipe whose run says that its reward model is trained."""
    settings = recipe(tmp_path)
    spec = StageSpec("rm", RunDirectory(settings.run_directory).round(1).reward_model, {})
    begin(spec)
    complete(spec, [], 0.0, {})
    return settings


def test_comparisons_cannot_be_scored_before_there_is_a_reward_model_and_the_advice_names_the_run(tmp_path):
    with pytest.raises(UsageProblem, match=rf"run `amenable rm RECIPE --run {tmp_path}/run`, with this recipe, first"):
        score_comparisons(recipe(tmp_path), "pairs.jsonl", Progress(json=True), None)
    with pytest.raises(UsageProblem, match=r"run `amenable rm RECIPE`, with"):
        score_comparisons(Recipe(name="no-such-run"), "pairs.jsonl", Progress(json=True), None)


def test_comparisons_that_are_not_there_or_whose_store_does_not_answer_are_one_sentence(tmp_path, monkeypatch):
    settings = trained(tmp_path)
    with pytest.raises(UsageProblem, match=r"^nowhere\.jsonl: there is no such file or directory\.$"):
        score_comparisons(settings, "nowhere.jsonl", Progress(json=True), None)

    class Unreachable:
        def get_file_info(self, path):
            raise OSError("Could not resolve host: nope.s3.amazonaws.com")

    monkeypatch.setattr("corpus.readers.resolve", lambda _: (Unreachable(), "nope/a.jsonl"))
    with pytest.raises(UsageProblem, match=r"^s3://nope/a\.jsonl: cannot be reached \(Could not resolve host"):
        score_comparisons(settings, "s3://nope/a.jsonl", Progress(json=True), None)


def test_under_a_job_a_relative_run_directory_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(JOB_CONFIG, '{"metadata": {"job_submission_id": "ann.x.1"}}')
    settings = Recipe(name="small")
    with pytest.raises(UsageProblem, match=r"^runs/small would be in the working directory of the Ray job ann\.x\.1"):
        run_pipeline(settings, until=None, progress=Progress(json=True), address=None)
    with pytest.raises(UsageProblem, match=r"^runs/small would be in the working directory"):
        score_comparisons(settings, "x.jsonl", progress=Progress(json=True), address=None)
    assert list(tmp_path.iterdir()) == []


def test_a_variable_that_is_asked_for_and_not_set_is_told(monkeypatch):
    monkeypatch.setenv("THERE", "x")
    monkeypatch.setenv("EMPTY", "")
    check_variables(["THERE"])
    with pytest.raises(UsageProblem, match=r"^The environment has no EMPTY and no ABSENT, which --env asks for"):
        check_variables(["THERE", "EMPTY", "ABSENT"])
    with pytest.raises(UsageProblem, match=r"^--env THERE=… gives a value"):
        check_variables(["THERE=x"])
