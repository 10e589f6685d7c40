"""`amenable manifests`: what it writes from a recipe's plan, and what it refuses."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from amenable.cli import app
from amenable.doctor import bundles_of
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe, resolved
from cluster.manifest_rules import problems
from cluster.manifests import PARTS
from cluster.packing import Room
from cluster.room import check_room

RECORDED = Path(__file__).parents[1] / "cluster" / "recorded"
PAPER = ["paper", "--model", "gpt3-1.3b"]


def command(*words: str):
    return CliRunner().invoke(app, ["manifests", *words])


def documents(*words: str) -> dict[str, dict]:
    """What the command writes of all parts, by kind; of several of one kind the last."""
    ended = command(*words, *([] if "--parts" in words else ["--parts", ",".join(PARTS)]))
    assert ended.exit_code == 0, ended.output
    found = list(yaml.safe_load_all(ended.stdout))
    assert problems(found) == []
    return {document["kind"]: document for document in found}


def groups(job: dict) -> dict[str, dict]:
    return {group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


def rooms_of_pods(cluster: dict) -> list[Room]:
    """What Ray has on the pods of a cluster's worker groups."""
    found = []
    for group in cluster["workerGroupSpecs"]:
        cpus, labels = float(group["rayStartParams"]["num-cpus"]), frozenset(group.get("labels", {}).items())
        each = gpus(group) / group["replicas"]
        found += [Room(f"{group['groupName']}-{at}", cpus, each, cpus, each, labels) for at in range(group["replicas"])]
    return found


def gpus(group: dict) -> int:
    [container] = group["template"]["spec"]["containers"]
    return group["replicas"] * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))


@pytest.mark.parametrize("recipe", ["demo", "throughput"])
def test_packaged_recipes_give_manifests_that_keep_every_rule(recipe):
    found = documents(recipe)
    assert {"RayJob", "RayService", "RayCluster", "NetworkPolicy", "PodMonitor", "ServiceAccount"} <= found.keys()
    text = found["ConfigMap"]["data"]["recipe.yaml"]
    roles = {"learners": "learners", "rollouts": "generators", "scoring": "scoring"}
    on_its_group = [f"{role}.node_labels.amenable-role={group}" for role, group in roles.items()]
    assert text == resolved(load_recipe(recipe, on_its_group, Recipe))


@pytest.mark.parametrize("words", [["demo"], ["demo", "rollouts.generators=3"], [*PAPER, "learners.workers=16"]])
def test_every_role_finds_room_on_the_pods_of_its_own_group_and_on_no_others(words):
    found = documents(*words)
    asked = Recipe.model_validate(yaml.safe_load(found["ConfigMap"]["data"]["recipe.yaml"]))
    spec = found["RayJob"]["spec"]["rayClusterSpec"]
    for bundle in bundles_of(asked):
        [group] = [name for name in groups(found["RayJob"]) if bundle.labels == {("amenable-role", name)}]
        assert group == {"learner": "learners", "generator": "generators"}.get(bundle.role, "scoring")
    assert check_room(bundles_of(asked), rooms_of_pods(spec), None).state == "ok"
    for group in spec["workerGroupSpecs"]:
        left = spec | {"workerGroupSpecs": [each for each in spec["workerGroupSpecs"] if each is not group]}
        assert "there is no such node" in check_room(bundles_of(asked), rooms_of_pods(left), None).says


def test_labels_that_the_recipe_names_are_those_of_the_pods_but_for_rays_own():
    own = "learners.node_labels={pool: a, ray.io/accelerator-type: H100}"
    found = documents("demo", own)
    asked = yaml.safe_load(found["ConfigMap"]["data"]["recipe.yaml"])
    assert asked["learners"]["node_labels"] == {"pool": "a", "ray.io/accelerator-type": "H100"}
    assert {name: group["labels"] for name, group in groups(found["RayJob"]).items()} == {
        "learners": {"pool": "a"},
        "generators": {"amenable-role": "generators"},
        "scoring": {"amenable-role": "scoring"},
    }


@pytest.mark.parametrize("name", ["amenable-run", "amenable-client"])
def test_a_label_by_which_network_policies_know_pods_is_refused(name):
    ended = command("demo", f"scoring.node_labels.{name}=x")
    assert ended.exit_code == 2
    assert f"scoring.node_labels names {name}, by which" in ended.output


def test_a_learners_pod_has_room_for_what_weight_store_and_conductor_hold_there_too():
    """Five snapshots of the weights, where other pods have two; both in whole GiB."""
    of = groups(documents(*PAPER)["RayJob"])
    gib = {name: int(of[name]["rayStartParams"]["object-store-memory"]) >> 30 for name in ("learners", "generators")}
    assert gib["generators"] > 2, "the least there is says nothing"
    assert 2 * gib["learners"] > 5 * (gib["generators"] - 1)
    assert 2 * (gib["learners"] - 1) < 5 * gib["generators"]


def test_gpus_of_the_pods_are_those_of_the_recipe():
    job = documents(*PAPER)["RayJob"]
    assert {name: gpus(group) for name, group in groups(job).items()} == {"learners": 8, "generators": 4, "scoring": 2}
    assert groups(job)["learners"]["replicas"] == 1
    assert "cuda" in job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"]
    two_nodes = groups(documents(*PAPER, "learners.workers=16")["RayJob"])["learners"]
    assert (two_nodes["replicas"], gpus(two_nodes)) == (2, 16)


def test_ray_has_the_cpus_that_the_roles_ask_for():
    job = documents(*PAPER, "learners.threads=4", "rollouts.threads=3", "scoring.threads=2")["RayJob"]
    cpus = {name: int(group["rayStartParams"]["num-cpus"]) for name, group in groups(job).items()}
    assert cpus == {"learners": 8 * 4 + 1, "generators": 3, "scoring": 2}


def test_ranks_that_share_a_gpu_share_a_pod_and_other_parts_round_up():
    job = documents("demo", "learners.workers=2", "learners.gpus=0.5", "rollouts.gpus=0.25")["RayJob"]
    found = {name: gpus(group) for name, group in groups(job).items()}
    assert found == {"learners": 1, "generators": 1, "scoring": 0}


def test_generators_can_be_scaled_to_where_the_recipe_says():
    group = groups(documents("demo", "fleet.max_generators=5")["RayJob"])["generators"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 1, 5)


def test_grace_and_deadline_come_from_recipe_and_plan():
    job = documents(*PAPER, "learners.stop_grace_s=900")["RayJob"]
    [learners] = [groups(job)["learners"]["template"]["spec"]]
    assert learners["terminationGracePeriodSeconds"] > 900
    hours = json.loads(CliRunner().invoke(app, ["plan", *PAPER, "--json"]).stdout)["plan"]["hours"]
    assert math.isclose(job["spec"]["activeDeadlineSeconds"], 4 * 3600 * hours, abs_tol=1)


def grace_and_drain_s(job: dict) -> tuple[float, float]:
    pod = groups(job)["learners"]["template"]["spec"]
    [drain] = [v for v in pod["containers"][0]["env"] if v["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    return pod["terminationGracePeriodSeconds"], float(drain["value"])


def test_grace_and_drain_are_above_the_longest_checkpoint_that_a_run_measured(tmp_path):
    run = tmp_path / "measured"
    shutil.copytree(RECORDED / "demo", run)
    metrics = run / "round-01" / "ppo" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    took_s = 20.0

    def rendered(*words: str) -> tuple[dict, str]:
        ended = command("demo", "--from", str(run), *words)
        assert ended.exit_code == 0, ended.output
        [job] = [each for each in yaml.safe_load_all(ended.stdout) if each["kind"] == "RayJob"]
        return job, ended.stderr

    for step, line in enumerate(lines):
        line["time/checkpoint"] = took_s + 400 * (step == 2)
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job, said = rendered()
    grace_s, drain_s = grace_and_drain_s(job)
    assert 420 < drain_s < grace_s
    assert "took 420 s, and learners.stop_grace_s is 300" in said
    job, said = rendered("learners.stop_grace_s=600")
    assert grace_and_drain_s(job)[1] > 600
    assert "stop_grace_s" not in said


def test_what_the_plan_is_not_sure_of_is_said_on_standard_error_and_not_in_the_manifests():
    too_large = command("paper", "--model", "gpt3-6.7b")
    assert too_large.exit_code == 0
    assert re.search(r"learners is reckoned to need [\d.]+ of the 79\.?\d* GiB", too_large.stderr)
    assert list(yaml.safe_load_all(too_large.stdout))
    fits = command(*PAPER)
    assert "is reckoned to need" not in fits.stderr
    [job] = [each for each in yaml.safe_load_all(fits.stdout) if each["kind"] == "RayJob"]
    assert f"activeDeadlineSeconds {job['spec']['activeDeadlineSeconds']}" in fits.stderr
    assert "h100-80gb" in fits.stderr
    assert "given 300 s for a checkpoint" in fits.stderr
    assert command("demo", "--parts", "serve").stderr == ""
    assert json.loads(command(*PAPER, "--json").stdout)["remarks"] == fits.stderr.splitlines()


def test_storage_image_claim_queue_and_parts_are_what_was_asked_for():
    found = documents(
        "demo", "name=mine", "--storage", "s3://bucket/runs?region=eu-1&x=y", "--image", "here/amenable:1",
        "--claim", "scratch", "--queue", "team", "--parts", "storage,common,train,serve", "--no-spot",
    )  # fmt: skip
    assert "RayCluster" not in found
    job = found["RayJob"]
    address = "s3://bucket/runs/mine?region=eu-1&x=y"
    assert f"--run '{address}'" in job["spec"]["entrypoint"]
    [application] = yaml.safe_load(found["RayService"]["spec"]["serveConfigV2"])["applications"]
    assert application["args"]["run"] == address
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    pod = groups(job)["generators"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "here/amenable:1"
    assert found["PersistentVolumeClaim"]["metadata"]["name"] == "scratch"
    assert "tolerations" not in pod


def test_without_parts_the_training_is_written_and_nothing_that_holds_runs_or_cannot_start_yet():
    found = list(yaml.safe_load_all(command("demo", "--claim", "mine").stdout))
    kinds = {document["kind"] for document in found}
    assert kinds == {"ServiceAccount", "ConfigMap", "NetworkPolicy", "PodMonitor", "RayJob"}
    assert problems(found) == []
    [job] = [document for document in found if document["kind"] == "RayJob"]
    volumes = groups(job)["learners"]["template"]["spec"]["volumes"]
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "mine"}} in volumes


HTTP_REWARD = ("reward.kind=http", "reward.url=http://reward.rlhf.svc:8000/score", "reward.token_variable=REWARD_TOKEN")


def environment(job: dict, group: str) -> dict[str, dict]:
    [container] = groups(job)[group]["template"]["spec"]["containers"]
    return {variable["name"]: variable for variable in container["env"]}


def test_what_the_recipe_names_is_there_by_reference_and_can_be_reached():
    found = list(yaml.safe_load_all(command("demo", *HTTP_REWARD, "tracking.wandb.project=p").stdout))
    [job] = [each for each in found if each["kind"] == "RayJob"]
    for group in groups(job):
        of_group = environment(job, group)
        assert of_group["REWARD_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "reward-token"
        assert of_group["WANDB_API_KEY"]["valueFrom"]["secretKeyRef"]["key"] == "wandb-api-key"
    [policy] = [each for each in found if each["metadata"]["name"] == "demo-outside"]
    assert {"protocol": "TCP", "port": 8000} in policy["spec"]["egress"][-1]["ports"]
    offline = documents("demo", "tracking.wandb.project=p", "tracking.wandb.mode=offline")["RayJob"]
    assert environment(offline, "learners").keys().isdisjoint({"REWARD_TOKEN", "WANDB_API_KEY"})


def test_a_corpus_in_an_object_store_has_its_keys_though_the_run_is_on_a_volume():
    job = documents("hh", "corpus.path=s3://bucket/hh?endpoint_override=10.0.0.5:9000")["RayJob"]
    [container] = groups(job)["learners"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "amenable-object-store", "optional": True}}]


def test_json_has_the_same_text():
    assert json.loads(command("demo", "--json").stdout)["manifests"] == command("demo").stdout


def test_no_secret_of_this_machine_is_in_a_manifest(monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "AMENABLE_TOKENS", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "canary-7f3a")
    assert "canary" not in command("demo").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hh"], "relative to this machine's directory"),
        (["demo", "--storage", "runs"], "should be below /shared"),
        (["demo", "--storage", "/sharedruns"], "should be below /shared"),
        (
            ["demo", "--parts", "train,server"],
            "--parts 'train,server' should be some of storage, common, train, serve, interactive",
        ),
        (["demo", "ppo.clap=1"], "clap"),
        (["demo", "reward.kind=http", "reward.url=http://reward:port/"], "this is no web address"),
        (["demo", "reward.kind=huggingface", "reward.model=./reward"], "relative to this machine's directory"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_exit_code_2(words, says):
    ended = command(*words)
    assert ended.exit_code == 2
    assert says in ended.stderr
    assert ended.stdout == ""
