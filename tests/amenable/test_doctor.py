"""amenable doctor: what a recipe's roles reserve, what is told, and that a run does not start where it cannot."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from amenable import doctor as commanded
from amenable.cli import app
from amenable.crew import Crew
from amenable.doctor import bundles_of, check_before_start, examine_cluster, needs_of
from amenable.permanent_failure import TOO_SMALL
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe
from cluster import doctor
from cluster.capacity import Capacity
from cluster.checks import Finding
from cluster.node_facts import NodeFacts
from cluster.packing import Bundle, Room
from corpus.problems import RunProblem

SOUND = NodeFacts(
    "3.11.7",
    {
        "ray": "2.60.0",
        "torch": "2.13.0",
        "vllm": "0.32.0",
        "transformers": "5.19.0",
        "deepspeed": "0.19.8",
        "pyarrow": "26.0.1",
        "numpy": "2.3.5",
    },
    {"torch": ""},
    memory_bytes=64 << 30,
)
ROOM = Room("n1", 8, 0, 8, 0)


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of one sound node; its facts and rooms can be changed."""
    state = SimpleNamespace(facts=SOUND, rooms={"1": ROOM}, groups=None)
    monkeypatch.setattr(doctor, "capacity", lambda meanwhile: Capacity(state.rooms, state.groups))
    monkeypatch.setattr(doctor, "LOOK_S", 0.001)

    def on_nodes(function, arguments, names, deadline_s, meanwhile):
        if function is doctor.gather:
            return {names[number]: state.facts for number in arguments}, {}
        return {names[number]: function(*given) for number, given in arguments.items()}, {}

    monkeypatch.setattr(doctor, "_on_nodes", on_nodes)
    return state


def recipe(tmp_path, **settings) -> Recipe:
    return Recipe.model_validate({"name": "small", "run_directory": str(tmp_path / "run"), **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learners": {"workers": 2, "threads": 3}, "rollouts": {"generators": 3, "threads": 2}},
        {"scoring": {"fused": False, "scorers": 2, "references": 3, "threads": 2}},
    ],
)
def test_the_bundles_are_those_that_a_local_session_has_cpus_for(tmp_path, settings):
    asked = recipe(tmp_path, **settings)
    crew = Crew(asked, tmp_path, Progress(json=True), None)
    assert sum(bundle.cpus for bundle in bundles_of(asked)) == crew._cpus() - 1  # which has one for what comes by


def test_learners_of_ray_train_are_counted_with_generators_and_scoring(tmp_path):
    asked = recipe(tmp_path, learners={"workers": 2, "gpus": 1}, rollouts={"gpus": 0.5}, ppo={"batch_size": 512})
    assert bundles_of(asked) == [
        Bundle("learner", 1, 1.0),
        Bundle("learner", 1, 1.0),
        Bundle("generator", 1, 0.5),
        Bundle("scoring", 1, 0.0),
    ]


def test_learners_that_must_be_on_one_node_are_one_bundle_and_are_reckoned_one_by_one(tmp_path):
    asked = recipe(tmp_path, learners={"workers": 2, "gpus": 1, "placement": "strict_pack"}, ppo={"batch_size": 512})
    assert bundles_of(asked)[0] == Bundle("learner", 1, 1.0, processes=2)
    assert [need.role for need in needs_of(asked)] == ["learner", "learner", "generator", "scoring"]
    assert all(need.gpus == (1.0 if need.role == "learner" else 0.0) for need in needs_of(asked))


def test_the_labels_that_a_role_asks_its_nodes_for_are_counted(tmp_path):
    plain = recipe(tmp_path, learners={"workers": 2}, scoring={"fused": False})
    spot = {"pool": "b", "ray.io/market-type": "spot"}
    named = {"learners": {"pool": "a"}, "rollouts": spot, "scoring": {"pool": "c"}}
    asked = recipe(
        tmp_path,
        learners={"workers": 2, "node_labels": named["learners"]},
        rollouts={"node_labels": named["rollouts"]},
        scoring={"fused": False, "node_labels": named["scoring"]},
    )
    roles = {"learner": "learners", "generator": "rollouts", "reward": "scoring", "reference": "scoring"}
    assert [replace(each, labels=frozenset()) for each in bundles_of(asked)] == bundles_of(plain)
    assert all(each.labels == frozenset(named[roles[each.role]].items()) for each in bundles_of(asked))
    for wrong in ("!spot", "in(a,b)", "", "a b"):  # Ray's operators, which the arithmetic does not know; and no labels
        with pytest.raises(ValueError, match="is no label"):
            recipe(tmp_path, learners={"node_labels": {"pool": wrong}})


def test_a_sound_cluster_passes_and_is_left_as_it_was(cluster, tmp_path):
    findings = examine_cluster(recipe(tmp_path), [], Progress(json=True))
    assert {finding.state for finding in findings} == {"ok"}
    checks = [finding.check for finding in findings]
    assert checks == [
        "nodes",
        "python",
        "packages",
        "imports",
        "devices",
        "driver",
        "environment",
        "storage",
        "memory",
        "placement",
    ]
    check_before_start(recipe(tmp_path), [], Progress(json=True))
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_not_start_where_a_node_is_not_sound(cluster, tmp_path):
    cluster.facts = NodeFacts("3.11.7", {**SOUND.packages, "torch": "2.12.0"}, {"vllm": "ImportError: no libcuda"})
    with pytest.raises(
        RunProblem, match=r"cannot run this recipe\. packages: n1 has torch 2\.12\.0.*imports: n1 cannot"
    ):
        check_before_start(recipe(tmp_path), [], Progress(json=True))


def test_a_run_does_not_start_without_room_for_all_roles_at_once(cluster, tmp_path):
    cluster.rooms = {"1": Room("n1", 2, 0, 2, 0)}
    with pytest.raises(RunProblem, match=r"placement: 1 scoring \(1 CPU\): .*no room|placement: .*none has that free"):
        check_before_start(recipe(tmp_path), [], Progress(json=True))
    cluster.rooms = {"1": Room("n1", 3, 0, 3, 0)}
    check_before_start(recipe(tmp_path), [], Progress(json=True))


def test_a_run_in_an_object_store_needs_its_working_copy_seen_by_all_nodes_too(monkeypatch, tmp_path):
    monkeypatch.setenv("AMENABLE_WORKING_COPIES", str(tmp_path))
    run = commanded.RunDirectory("s3://bucket/runs/x")
    assert commanded._places(run) == ["s3://bucket/runs/x", str(run.root)]
    assert str(run.root).startswith(str(tmp_path))


def test_the_command_tells_every_finding_and_its_exit_code_whether_one_failed(monkeypatch, tmp_path):
    findings = [Finding("python", "ok", "Python 3.11.7"), Finding("placement", "unknown", "unknown until scaled")]
    monkeypatch.setattr(commanded, "examined", lambda *_: findings)
    ended = CliRunner().invoke(app, ["doctor"])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.splitlines()[0].split() == ["ok", "python", "Python", "3.11.7"]
    findings.append(Finding("driver", "failed", "n2 has driver 520"))
    ended = CliRunner().invoke(app, ["doctor", "--json"])
    assert ended.exit_code == 1
    answer = json.loads(ended.stdout)
    assert answer["passed"] is False
    said = {"check": "driver", "state": "failed", "says": "n2 has driver 520", "for_good": False}
    assert answer["findings"][2] == said


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["no-such-recipe"], 2, "There is no recipe file"),
        (["demo", "seed=x"], 2, "seed"),
        (["--env", "A=b"], 2, "gives a value"),
        (["demo", "--address", "nowhere"], 2, "is no address of a Ray cluster"),
        (["--address", "127.0.0.1:1"], 4, "Could not connect to the Ray cluster"),
    ],
)
def test_what_is_wrong_with_the_question_is_told(arguments, code, says):
    ended = CliRunner().invoke(app, ["doctor", *arguments])
    assert ended.exit_code == code, ended.output
    assert says in ended.stderr


def test_this_machine_is_looked_at_in_a_process_that_may_break(monkeypatch):
    monkeypatch.setattr(commanded, "MODULES", ("json",))
    monkeypatch.setenv("THERE", "x")
    facts, problem = commanded._facts_here(["THERE", "ABSENT"])
    assert problem == ""
    assert facts is not None
    assert (facts.imports, facts.missing_variables) == ({"json": ""}, ("ABSENT",))
    assert facts.packages["ray"] == "2.60.0"
    monkeypatch.setattr(commanded, "_GATHER", "import os; os.abort()")
    assert commanded._facts_here([]) == (None, "looking at it ended with -6 (no reason given)")


def test_the_packaged_demo_finds_room_on_a_small_node(tmp_path):
    asked = load_recipe("demo", [], Recipe)
    assert sum(bundle.cpus for bundle in bundles_of(asked)) <= 4


@pytest.mark.parametrize("scoring", [{}, {"fused": False, "references": 2}])
def test_every_bundle_has_an_estimate_of_its_memory_in_the_same_order(tmp_path, scoring):
    asked = recipe(tmp_path, scoring=scoring, rollouts={"gpus": 0.5})
    needs = needs_of(asked)
    assert [(need.role, need.gpus) for need in needs] == [(each.role, each.gpus) for each in bundles_of(asked)]
    assert all(need.device_bytes > 100 << 20 for need in needs)


def test_a_run_does_not_start_where_its_roles_need_more_memory_than_a_node_has(cluster, tmp_path):
    cluster.facts = replace(SOUND, memory_bytes=2 << 30)
    with pytest.raises(
        RunProblem, match=r"memory: learner, generator, scoring take \d+\.\d GiB together, and n1 has 2\.0"
    ):
        check_before_start(recipe(tmp_path), [], Progress(json=True))
    cluster.facts = replace(SOUND, memory_bytes=100 << 20)
    with pytest.raises(RunProblem) as told:
        check_before_start(recipe(tmp_path), [], Progress(json=True))
    assert told.value.code == TOO_SMALL
