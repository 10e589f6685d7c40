"""Manifests: what is put in place, against KubeRay's schemas and Kubernetes' own, with a mutation of every kind."""

import copy
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from asked_manifests import ASKED, GROUPS, documents, one
from kuberay_schema import FILES, FOLDER, violations
from typer.exceptions import TyperException

from amenable.cli import app
from cluster.manifest_rules import clusters, pods, problems
from cluster.manifests import PARTS, base_documents, kubernetes_name, render
from serving.application import Arguments, Channel

ROOT = Path(__file__).parents[2]
BASES = sorted(path.parent for path in (ROOT / "cluster" / "k8s").glob("*/kustomization.yaml"))
OVERLAYS = sorted(path.parent for path in (ROOT / "cluster" / "k8s" / "overlays").glob("*/kustomization.yaml"))
NATIVE = ("ServiceAccount", "PersistentVolumeClaim", "ConfigMap", "NetworkPolicy")

needs_schemas = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="KubeRay's schemas are not there (../shared/data/kuberay-crds)"
)
needs_kustomize = pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl, which has kustomize")


def built(overlay: Path) -> list[dict[str, Any]]:
    run = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=True, timeout=60)
    return list(yaml.safe_load_all(run.stdout))


def whole(overlay: Path) -> list[dict[str, Any]]:
    """What an overlay makes of the training, and of the endpoint beside it."""
    return [*built(overlay), *built(overlay / "serve")]


def requested(found: list[dict[str, Any]], resource: str) -> float:
    """What all pods of the documents ask Kubernetes for: cores, or GiB of memory."""
    units = {"": 1.0, "m": 0.001, "Mi": 1 / 1024, "Gi": 1.0}
    total = 0.0
    for document in found:
        for spec in clusters([document]):
            groups = [(1, spec["headGroupSpec"])] + [(each["replicas"], each) for each in spec["workerGroupSpecs"]]
            templates = [(count, group["template"]) for count, group in groups]
            if "submitterPodTemplate" in document["spec"]:
                templates.append((1, document["spec"]["submitterPodTemplate"]))
            for count, template in templates:
                [container] = template["spec"]["containers"]
                amount = re.fullmatch(r"([0-9.]+)(\D*)", container["resources"]["requests"][resource])
                assert amount
                total += count * float(amount[1]) * units[amount[2]]
    return total


def parsed(line: str) -> dict[str, Any]:
    """The parameters that the program's own command line takes from a manifest's command; raises where it has none."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "amenable"]
    group: Any = typer.main.get_command(app)
    return group.commands[words[3]].make_context(words[3], words[4:]).params


# what is put in place ----------------------------------------------------------------------------------------------


def test_a_job_runs_the_recipe_in_a_directory_that_outlives_its_cluster():
    found = documents()
    job = one("RayJob", found)
    given = parsed(job["spec"]["entrypoint"])
    assert given["run"] == "/shared/runs/hh-8b"
    assert given["address"] == "auto"
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in head["volumes"]}
    assert given["recipe"] == "/etc/amenable/recipe.yaml"
    assert volumes[mounts["/etc/amenable"]]["configMap"]["name"] == one("ConfigMap", found)["metadata"]["name"]
    assert one("ConfigMap", found)["data"]["recipe.yaml"] == ASKED.recipe
    claim = volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"]
    assert claim == one("PersistentVolumeClaim", found)["metadata"]["name"] == "runs"
    assert job["spec"]["metadata"] == {"run": "hh-8b", "recipe": ASKED.recipe_hash}
    assert job["spec"]["activeDeadlineSeconds"] == 90_000
    assert job["spec"]["backoffLimit"] > 0


def test_each_role_has_a_group_of_its_size():
    groups = one("RayJob", documents())["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for group, asked in zip(groups, GROUPS, strict=True):
        assert (group["groupName"], group["replicas"], group["maxReplicas"]) == (
            asked.name,
            asked.pods,
            asked.most_pods,
        )
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        assert limits["nvidia.com/gpu"] == str(asked.gpus)
        assert int(limits["cpu"]) == int(group["rayStartParams"]["num-cpus"]) + 1
        assert container["image"] == ASKED.image
        assert group["template"]["metadata"]["labels"]["amenable-role"] == asked.name
        assert group.get("labels", {}) == asked.labels


def test_shared_memory_is_the_object_store_and_a_gib_for_each_gpu():
    groups = one("RayJob", documents())["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for group, asked in zip(groups, GROUPS, strict=True):
        assert int(group["rayStartParams"]["object-store-memory"]) == asked.object_store_gib << 30
        [shm] = [each for each in group["template"]["spec"]["volumes"] if each["name"] == "shm"]
        assert shm["emptyDir"]["sizeLimit"] == f"{asked.object_store_gib + asked.gpus}Gi"
        assert asked.memory_gib > asked.shared_memory_gib


def test_what_a_pod_writes_outside_the_run_is_the_images_home_and_temporary_files():
    from cluster.manifest_rules import WRITTEN

    dockerfile = (ROOT / "cluster" / "docker" / "Dockerfile").read_text()
    [home] = re.findall(r"^WORKDIR (/home/.*)$", dockerfile, re.MULTILINE)
    assert home in WRITTEN
    assert "--create-home amenable" in dockerfile
    for spec in clusters(documents(run_directory="s3://bucket/hh-8b")):
        for _, template in pods(spec):
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            [container] = template["spec"]["containers"]
            named = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert all(named[place]["emptyDir"] == {} for place in WRITTEN)
            cache = {each["name"]: each.get("value") for each in container["env"]}["HF_HOME"]
            assert Path(cache).parent in map(Path, WRITTEN)


def test_generators_alone_may_run_on_spot_nodes():
    def keys(found: list[dict[str, Any]]) -> dict[str, set[str]]:
        groups = one("RayJob", found)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        return {
            group["groupName"]: {each["key"] for each in group["template"]["spec"]["tolerations"]} for group in groups
        }

    gpu, spot = "nvidia.com/gpu", "cloud.google.com/gke-spot"
    assert keys(documents())["learners"] == keys(documents())["scoring"] == {gpu}
    assert spot in keys(documents())["generators"]
    assert keys(documents(spot=False))["generators"] == {gpu}


def test_no_run_has_what_another_runs_pods_need_but_for_the_volume_and_the_secrets():
    """So that deleting one run's documents leaves others in the same namespace whole."""

    def named(found: list[dict[str, Any]]) -> set[tuple[str, str]]:
        return {(each["kind"], each["metadata"]["name"]) for each in found}

    def needed(found: list[dict[str, Any]]) -> set[tuple[str, str]]:
        places = {"serviceAccountName", "configMap", "claimName"}
        kinds = {"serviceAccountName": "ServiceAccount", "claimName": "PersistentVolumeClaim", "configMap": "ConfigMap"}
        seen: set[tuple[str, str]] = set()

        def look(value: Any) -> None:
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if key in places:
                    seen.add((kinds[key], inner["name"] if key == "configMap" else inner))
                if isinstance(inner, dict | list):
                    look(inner)

        look(found)
        return seen

    mine, theirs = documents(run="mine"), documents(run="theirs")
    assert needed(mine) <= named(mine)
    assert named(mine) & named(theirs) == needed(mine) & needed(theirs) == {("PersistentVolumeClaim", "runs")}


def test_drain_and_grace_are_above_the_time_of_a_checkpoint():
    for spec in clusters(documents()):
        for _, template in pods(spec):
            [container] = template["spec"]["containers"]
            environment = {each["name"]: each.get("value") for each in container["env"]}
            drain_s = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert ASKED.checkpoint_s < drain_s < template["spec"]["terminationGracePeriodSeconds"]


def test_pods_have_the_environment_that_a_local_sessions_workers_inherit():
    from cluster.session import ENVIRONMENT

    for spec in clusters(documents()):
        for _, template in pods(spec):
            [container] = template["spec"]["containers"]
            given = {each["name"]: each.get("value") for each in container["env"]}
            assert {name: given.get(name) for name in ENVIRONMENT} == ENVIRONMENT


def test_kueue_is_asked_where_a_queue_is_named():
    label = "kueue.x-k8s.io/queue-name"
    assert label not in one("RayJob", documents())["metadata"]["labels"]
    assert one("RayJob", documents(queue="team"))["metadata"]["labels"][label] == "team"


def test_the_service_follows_the_run_with_tokens_from_a_secret():
    service = one("RayService", documents())
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "serving.application:build"
    arguments = Arguments.model_validate(application["args"])
    [deployment] = application["deployments"]
    assert Channel.model_validate(deployment["user_config"]).run == arguments.run == "/shared/runs/hh-8b"
    assert deployment["autoscaling_config"]["max_replicas"] == 3
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    place = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "serving-tokens")
    assert arguments.token_file == f"{place}/tokens.json"
    volume = next(v for v in group["template"]["spec"]["volumes"] if v["name"] == "serving-tokens")
    assert volume["secret"] == {"secretName": "amenable-serving-tokens"}


def test_the_service_of_a_run_in_an_object_store_names_its_address_and_shares_no_volume():
    found = documents(run_directory="s3://bucket/hh-8b?region=eu-1")
    service = one("RayService", found)
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    arguments = Arguments.model_validate(application["args"])
    assert arguments.run == "s3://bucket/hh-8b?region=eu-1"
    [deployment] = application["deployments"]
    assert deployment["user_config"] == {"run": arguments.run, "channel": "policy"}
    for _, template in pods(service["spec"]["rayClusterConfig"]):
        pod = template["spec"]
        assert all("persistentVolumeClaim" not in volume for volume in pod["volumes"])
        [container] = pod["containers"]
        assert {m["name"] for m in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
        assert container["envFrom"] == [{"secretRef": {"name": "amenable-object-store", "optional": True}}]
        variables = {each["name"]: each.get("value") for each in container["env"]}
        places = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert places[variables["AMENABLE_WORKING_COPIES"]] == "mirror"
    for _, template in pods(one("RayJob", found)["spec"]["rayClusterSpec"]):
        assert any("persistentVolumeClaim" in volume for volume in template["spec"]["volumes"])
    assert problems(found) == []


def test_a_run_in_an_object_store_has_its_keys_by_reference():
    found = documents(run_directory="s3://bucket/hh-8b")
    job = one("RayJob", found)
    assert parsed(job["spec"]["entrypoint"])["run"] == "s3://bucket/hh-8b"
    for _, template in pods(job["spec"]["rayClusterSpec"]):
        [container] = template["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "amenable-object-store", "optional": True}}]
        variables = {each["name"]: each.get("value") for each in container["env"]}
        assert variables["AMENABLE_WORKING_COPIES"].startswith("/shared/")


def test_training_has_the_secrets_that_its_recipe_names_and_the_endpoint_has_none_of_them():
    found = documents(secret_variables=("REWARD_TOKEN", "HF_TOKEN"), addresses=("s3://bucket/corpus.jsonl",))
    for kind in ("RayJob", "RayCluster"):
        for spec in clusters([one(kind, found)]):
            for _, template in pods(spec):
                [container] = template["spec"]["containers"]
                named = [each for each in container["env"] if each["name"] in ("REWARD_TOKEN", "HF_TOKEN")]
                assert {each["name"]: each["valueFrom"]["secretKeyRef"] for each in named} == {
                    "HF_TOKEN": {"name": "amenable-secrets", "key": "hf-token", "optional": True},
                    "REWARD_TOKEN": {"name": "amenable-secrets", "key": "reward-token"},
                }
                assert len(named) == 2
                assert container["envFrom"] == [{"secretRef": {"name": "amenable-object-store", "optional": True}}]
                assert "AMENABLE_WORKING_COPIES" not in {each["name"] for each in container["env"]}
    for spec in clusters([one("RayService", found)]):
        for _, template in pods(spec):
            [container] = template["spec"]["containers"]
            assert "REWARD_TOKEN" not in {each["name"] for each in container["env"]}
            assert "envFrom" not in container
    assert problems(found) == []
    for spec in clusters(documents()):
        assert all("envFrom" not in template["spec"]["containers"][0] for _, template in pods(spec))


def outside(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    [policy] = [each for each in found if each["metadata"]["name"] == "hh-8b-outside"]
    return policy["spec"]["egress"]


def test_pods_reach_names_https_and_the_servers_of_the_recipe_alone():
    names, https = outside(documents())
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in names["to"]
    assert {(each["protocol"], each["port"]) for each in names["ports"]} == {("UDP", 53), ("TCP", 53)}
    assert https["ports"] == [{"protocol": "TCP", "port": 443}]
    assert [each["ipBlock"]["cidr"] for each in https["to"]] == ["0.0.0.0/0", "::/0"]
    _, everywhere, inside = outside(
        documents(
            addresses=("http://reward.rlhf.svc:8000/score",),
            run_directory="s3://bucket/hh-8b?endpoint_override=minio.example.org:9000",
        )
    )
    assert [each["port"] for each in everywhere["ports"]] == [443, 9000]
    assert inside["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "rlhf"}}}]
    assert [each["port"] for each in inside["ports"]] == [8000]


def test_what_is_applied_as_a_part_can_be_deleted_without_taking_what_others_need():
    kinds = {part: {document["kind"] for document in render(ASKED, (part,))} for part in PARTS}
    assert kinds == {
        "storage": {"PersistentVolumeClaim"},
        "common": {"ServiceAccount", "ConfigMap", "NetworkPolicy", "PodMonitor"},
        "train": {"RayJob"},
        "serve": {"RayService"},
        "interactive": {"RayCluster"},
    }
    assert [document for part in PARTS for document in render(ASKED, (part,))] == documents()


def test_an_interactive_cluster_waits_for_a_person():
    groups = one("RayCluster", documents())["spec"]["workerGroupSpecs"]
    assert {group["replicas"] for group in groups} == {0}
    assert [group["maxReplicas"] for group in groups] == [group.most_pods for group in GROUPS]


@pytest.mark.parametrize(
    ("run", "begins"),
    [("demo", "demo"), ("HH.8b", "hh-8b-"), ("7b", "run-7b-"), ("a_b", "a-b-"), ("a-b", "a-b"), ("x" * 90, "x" * 30)],
)
def test_a_run_has_a_name_that_kubernetes_takes(run, begins):
    name = kubernetes_name(run)
    assert name.startswith(begins)
    assert len(f"{name}-serve") <= 47
    assert problems(documents(run=run)) == []


def test_two_runs_never_share_a_name():
    runs = ["a-b", "a_b", "a.b", "A-b", "x" * 90, "x" * 91]
    assert len({kubernetes_name(run) for run in runs}) == len(runs)


# against schemas ---------------------------------------------------------------------------------------------------


@needs_schemas
@pytest.mark.parametrize("kind", FILES)
def test_ray_kinds_are_valid_by_kuberays_schemas(kind):
    asked = documents(run_directory="s3://bucket/x", queue="team", secret_variables=("REWARD_TOKEN",))
    for found in (documents(), asked, base_documents()):
        assert violations(one(kind, found)) == []


@needs_schemas
@pytest.mark.parametrize(
    ("kind", "path", "key"),
    [
        ("RayJob", ["spec"], "backofLimit"),
        ("RayJob", ["spec", "rayClusterSpec", "workerGroupSpecs", 0], "minReplica"),
        ("RayService", ["spec"], "serveConfigV3"),
        ("RayService", ["spec", "rayClusterConfig", "headGroupSpec", "template", "spec"], "serviceAcountName"),
        ("RayCluster", ["spec", "headGroupSpec", "template", "spec", "containers", 0], "imagePullPolcy"),
    ],
)
def test_a_typo_in_a_ray_kind_is_caught(kind, path, key):
    document = copy.deepcopy(one(kind, documents()))
    at = document
    for part in path:
        at = at[part]
    at[key] = 1
    assert any(key in violation for violation in violations(document))


@needs_schemas
def test_a_wrong_type_and_a_missing_head_are_caught():
    document = copy.deepcopy(one("RayCluster", documents()))
    document["spec"]["workerGroupSpecs"][0]["replicas"] = "one"
    assert violations(document)
    del document["spec"]["headGroupSpec"]
    assert any("headGroupSpec" in violation for violation in violations(document))


def native_problem(document: dict[str, Any]) -> str:
    """What kubernetes-validate --strict says of a document; "" where it is valid."""
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    try:
        validate.validate(document, "1.33", strict=True)
    except validate.ValidationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", NATIVE)
def test_native_kinds_are_valid_by_kubernetes_own_schemas(kind):
    servers = ("http://reward.rlhf.svc:8000", "http://minio:9000")
    found = [document for document in documents(addresses=servers) if document["kind"] == kind]
    assert found
    assert [native_problem(document) for document in found] == [""] * len(found)


@pytest.mark.parametrize(
    ("kind", "path", "key"),
    [
        ("ServiceAccount", [], "automountServiceAcountToken"),
        ("PersistentVolumeClaim", ["spec"], "accesModes"),
        ("ConfigMap", [], "dat"),
        ("NetworkPolicy", ["spec"], "policyType"),
    ],
)
def test_a_typo_in_a_native_kind_is_caught(kind, path, key):
    document = copy.deepcopy(next(each for each in documents() if each["kind"] == kind))
    at = document
    for part in path:
        at = at[part]
    at[key] = "x"
    assert key in native_problem(document)


def test_pod_templates_are_valid_by_kubernetes_own_schema_of_a_pod():
    """KubeRay's schemas take pods as they are; a pod of each template says whether Kubernetes would."""
    for spec in clusters(documents()):
        for _, template in pods(spec):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
            assert native_problem(pod) == ""


# bases and overlays ------------------------------------------------------------------------------------------------


def test_the_bases_are_the_packaged_demo_and_keep_every_rule():
    found = base_documents()
    assert problems(found) == []
    recipe = one("ConfigMap", found)["data"]["recipe.yaml"]
    assert yaml.safe_load(recipe) == yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    job = one("RayJob", found)["spec"]
    given = parsed(job["entrypoint"])
    assert given["run"] == "/shared/runs/demo"
    groups = [each["groupName"] for each in job["rayClusterSpec"]["workerGroupSpecs"]]
    roles = zip(("learners", "rollouts", "scoring"), groups, strict=True)
    assert given["overrides"] == [f"{role}.node_labels.amenable-role={group}" for role, group in roles]


@needs_kustomize
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_overlays_build_keep_every_rule_and_run_commands_that_there_are(overlay):
    found = whole(overlay)
    assert problems(found) == []
    assert parsed(one("RayJob", found)["spec"]["entrypoint"])["run"] == "/shared/runs/demo"
    images = {
        c["image"] for spec in clusters(found) for _, template in pods(spec) for c in template["spec"]["containers"]
    }
    assert len(images) == 1
    has_gpu = "gpu" in overlay.name
    assert ("cuda" in images.pop()) == has_gpu
    groups = one("RayJob", found)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == has_gpu


@needs_kustomize
@needs_schemas
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_overlays_are_valid_by_the_schemas(overlay):
    for document in whole(overlay):
        if document["kind"] in FILES:
            assert violations(document) == []
        elif document["kind"] in NATIVE:
            assert native_problem(document) == ""


@needs_kustomize
def test_the_overlays_ask_for_the_gpus_and_give_the_labels_that_their_commands_use():
    from amenable.plan import planned
    from amenable.recipe import Recipe
    from amenable.recipe_loading import load_recipe
    from cluster.worker_groups import serving_group

    def gpus_of(cluster: dict[str, Any]) -> int:
        return sum(
            group["replicas"]
            * int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
            for group in cluster["workerGroupSpecs"]
        )

    for overlay in OVERLAYS:
        found = whole(overlay)
        job = one("RayJob", found)["spec"]
        given = parsed(job["entrypoint"])
        recipe = load_recipe("demo", list(given["overrides"] or []), Recipe)
        groups = {each["groupName"]: each["labels"] for each in job["rayClusterSpec"]["workerGroupSpecs"]}
        assert groups == {
            "learners": recipe.learners.node_labels,
            "generators": recipe.rollouts.node_labels,
            "scoring": recipe.scoring.node_labels,
        }
        assert len({tuple(labels.items()) for labels in groups.values()}) == len(groups)
        assert gpus_of(job["rayClusterSpec"]) == recipe.gpus
        plan = planned(recipe, None, None, None)
        service = one("RayService", found)["spec"]["rayClusterConfig"]
        serving = serving_group(plan.plan, recipe.serving, plan.shares.scorers)
        assert gpus_of(service) == serving.gpus
        [group] = service["workerGroupSpecs"]
        assert int(group["rayStartParams"]["num-cpus"]) >= serving.ray_cpus


@needs_kustomize
def test_the_bases_are_parts_of_their_own_that_apply_and_delete_alone():
    kinds = {base.name: {document["kind"] for document in built(base)} for base in BASES}
    assert kinds == {
        "storage": {"PersistentVolumeClaim"},
        "base": {"ServiceAccount", "ConfigMap", "NetworkPolicy", "PodMonitor", "RayJob"},
        "serve": {"RayService"},
        "interactive": {"RayCluster"},
    }
    for overlay in OVERLAYS:
        assert {document["kind"] for document in built(overlay)} <= kinds["base"]
        assert {document["kind"] for document in built(overlay / "serve")} == kinds["serve"]
    [claim] = built(ROOT / "cluster" / "k8s" / "overlays" / "cpu-kind" / "storage")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert native_problem(claim) == ""


@needs_kustomize
def test_the_overlay_for_one_machine_fits_one():
    """4 cores and 16 GiB, of which Kubernetes and the operator take about one and two."""
    kind = ROOT / "cluster" / "k8s" / "overlays" / "cpu-kind"
    for part in (built(kind), built(kind / "serve")):
        assert 0 < requested(part, "cpu") <= 3
        assert 0 < requested(part, "memory") <= 14
    assert requested(base_documents(("train",)), "cpu") > 4
    assert requested(base_documents(("train",)), "memory") > 16


def test_a_command_that_the_program_does_not_have_is_seen():
    job = one("RayJob", documents())
    line = job["spec"]["entrypoint"]
    for wrong in (line.replace(" run ", " train "), line.replace("--run", "--rum"), line.replace("python", "python3")):
        with pytest.raises((KeyError, AssertionError, TyperException)):
            parsed(wrong)
