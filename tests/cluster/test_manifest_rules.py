"""Each of KubeRay's rules, and of ours, with a manifest that breaks it and is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from asked_manifests import documents, one

from cluster.manifest_rules import problems

Document = dict[str, Any]
QUEUE = "kueue.x-k8s.io/queue-name"


def refused(kind: str, break_it: Callable[[Document], None], base: list[Document] | None = None) -> str:
    """What is said of the manifests once the document of `kind` was broken; they were right before."""
    found = copy.deepcopy(base or documents())
    assert problems(found) == []
    break_it(next(each for each in found if each["kind"] == kind))
    return " | ".join(problems(found))


def spec_of(document: Document) -> Document:
    """The Ray cluster in a document."""
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def head_of(document: Document) -> Document:
    return spec_of(document)["headGroupSpec"]


def group_of(document: Document, number: int = 0) -> Document:
    return spec_of(document)["workerGroupSpecs"][number]


def container_of(group: Document) -> Document:
    return group["template"]["spec"]["containers"][0]


def put(path: str, value: Any) -> Callable[[Document], None]:
    """Sets a dotted path below the document's spec."""

    def change(document: Document) -> None:
        at = document["spec"]
        *parts, last = path.split(".")
        for part in parts:
            at = at.setdefault(part, {})
        at[last] = value

    return change


def all_of(*changes: Callable[[Document], None]) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for each in changes:
            each(document)

    return change


def drop(*keys: str) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for key in keys:
            document["spec"].pop(key)

    return change


RULES_OF_DELETION = [{"condition": {"jobStatus": "SUCCEEDED"}, "policy": "DeleteCluster"}]
DELETES = put("deletionStrategy", {"deletionRules": RULES_OF_DELETION})
NO_SHUTDOWN = drop("shutdownAfterJobFinishes", "ttlSecondsAfterFinished")
SELECTS = put("clusterSelector", {"ray.io/cluster": "x"})
NO_RETRY = put("backoffLimit", 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("rayClusterSpec"), "needs rayClusterSpec or clusterSelector"),
        (SELECTS, "with clusterSelector there is no backoffLimit"),
        (all_of(SELECTS, NO_RETRY, put("suspend", True)), "with clusterSelector there is no backoffLimit"),
        (all_of(SELECTS, NO_RETRY, put("submissionMode", "SidecarMode")), "with clusterSelector there is no"),
        (put("shutdownAfterJobFinishes", False), "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
        (DELETES, "deletionRules exclude shutdownAfterJobFinishes"),
        (all_of(DELETES, drop("ttlSecondsAfterFinished")), "deletionRules exclude shutdownAfterJobFinishes"),
        (put("submissionMode", "InteractiveMode"), "InteractiveMode has no backoffLimit"),
        (put("submissionMode", "SidecarMode"), "SidecarMode has neither submitterPodTemplate"),
        (put("rayClusterSpec.rayVersion", "2.51.1"), "token authentication needs rayVersion 2.52"),
        (lambda d: d["metadata"].update(name="x" * 48), "its name must be at most 47"),
        (lambda d: d["metadata"].update(name="8b"), "its name must be at most 47"),
        (
            lambda d: (
                group_of(d)["rayStartParams"].update({"num-gpus": "8"}) or group_of(d).update(resources={"GPU": "8"})
            ),
            "resources stand in rayStartParams and in resources",
        ),
        (lambda d: group_of(d).update(resources={"GPU": "8"}), "resources stand in rayStartParams and in resources"),
        (lambda d: head_of(d).update(resources={"custom": "1"}), "head: resources stand in rayStartParams"),
        (lambda d: group_of(d)["rayStartParams"].update(labels="a=b"), "labels stand in rayStartParams"),
        (put("rayClusterSpec.networkPolicy", {"mode": "DenyAll"}), "its networkPolicy is alpha"),
        (lambda d: container_of(group_of(d)).update(livenessProbe={"httpGet": {}}), "has a probe of its own"),
        (lambda d: container_of(head_of(d)).update(readinessProbe={"exec": {}}), "has a probe of its own"),
        (all_of(NO_SHUTDOWN, put("suspend", True)), "suspend needs shutdownAfterJobFinishes"),
        (lambda d: group_of(d).pop("maxReplicas") and None, "minReplicas and maxReplicas are mandatory"),
        (lambda d: group_of(d).update(replicas=99), "replicas must be between"),
        (
            all_of(
                put("rayClusterSpec.enableInTreeAutoscaling", True),
                put("rayClusterSpec.autoscalerOptions", {"version": "v2"}),
                lambda d: group_of(d)["template"]["spec"].update(restartPolicy="Always"),
            ),
            "autoscaler v2 needs restartPolicy Never",
        ),
        (
            all_of(
                put("rayClusterSpec.gcsFaultToleranceOptions", {"redisAddress": "redis:6379"}),
                lambda d: container_of(head_of(d))["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis"}),
            ),
            "with gcsFaultToleranceOptions there is no RAY_REDIS_ADDRESS",
        ),
    ],
)
def test_kuberays_rules_of_a_job(change, says):
    assert says in refused("RayJob", change)


def test_what_the_rules_allow_passes():
    def jobs(*changes):
        found = copy.deepcopy(documents())
        for change in changes:
            change(one("RayJob", found))
        return problems(found)

    assert jobs(SELECTS, NO_RETRY, drop("rayClusterSpec")) == []
    assert jobs(DELETES, NO_SHUTDOWN) == []
    assert jobs(NO_RETRY, put("submissionMode", "InteractiveMode")) == []
    assert jobs(put("submissionMode", "SidecarMode"), drop("submitterPodTemplate", "submitterConfig")) == []
    assert (
        jobs(
            put("rayClusterSpec.enableInTreeAutoscaling", True),
            put("rayClusterSpec.autoscalerOptions", {"version": "v2"}),
        )
        == []
    )
    assert jobs(put("rayClusterSpec.rayVersion", "3.0.0")) == []
    assert jobs(put("suspend", True)) == []
    assert (
        jobs(
            lambda d: group_of(d)["rayStartParams"].pop("num-cpus") and None,
            lambda d: group_of(d).update(resources={"CPU": "9"}),
            lambda d: group_of(d).update(labels={"a": "b"}),
        )
        == []
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (NO_SHUTDOWN, "under Kueue it needs shutdownAfterJobFinishes"),
        (all_of(NO_SHUTDOWN, DELETES), "under Kueue it needs shutdownAfterJobFinishes"),
        (lambda d: group_of(d).update(groupName="head"), "none of them called head"),
        (put("rayClusterSpec.enableInTreeAutoscaling", True), "under Kueue autoscaling needs the annotation"),
        (lambda d: spec_of(d)["workerGroupSpecs"].extend(copy.deepcopy(group_of(d)) for _ in range(15)), "at most 17"),
    ],
)
def test_kueues_rules(change, says):
    assert says in refused("RayJob", change, documents(queue="team"))
    assert QUEUE not in refused("RayJob", lambda d: None)


@pytest.mark.parametrize(("kind", "longest"), [("RayCluster", 53), ("RayService", 47)])
def test_names_of_the_other_kinds(kind, longest):
    fits = copy.deepcopy(documents())
    one(kind, fits)["metadata"]["name"] = "x" * longest
    assert problems(fits) == []
    assert f"at most {longest}" in refused(kind, lambda d: d["metadata"].update(name="x" * (longest + 1)))


def ports_of(group: Document) -> list[Document]:
    return container_of(group)["ports"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: ports_of(head_of(d)).pop(), "its head needs a port called serve"),
        (lambda d: ports_of(head_of(d))[-1].update(containerPort=8001), "should be that of its workers"),
        (lambda d: ports_of(group_of(d)).pop(), "should be that of its workers"),
    ],
)
def test_a_service_has_the_port_of_which_kuberay_makes_its_own(change, says):
    assert says in refused("RayService", change)


@pytest.mark.parametrize("kind", ["RayJob", "RayService", "RayCluster"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "should run as non-root"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "seccomp's RuntimeDefault"),
        (lambda pod: pod.pop("automountServiceAccountToken"), "should not be given a service account's token"),
        (lambda pod: pod.update(hostNetwork=True), "should not share the node's namespaces"),
        (lambda pod: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "hostPath"),
        (lambda pod: pod["securityContext"].pop("fsGroupChangePolicy"), "fsGroupChangePolicy OnRootMismatch"),
        (lambda pod: pod["containers"][0]["securityContext"].pop("capabilities"), "should drop ALL capabilities"),
        (lambda pod: pod["containers"][0]["securityContext"].update(privileged=True), "should drop ALL capabilities"),
        (
            lambda pod: pod["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
            "should have a readOnlyRootFilesystem",
        ),
        (
            lambda pod: pod["containers"][0]["volumeMounts"].remove({"name": "tmp", "mountPath": "/tmp"}),
            "with volumes at /home/amenable and /tmp",
        ),
        (lambda pod: pod["containers"][0]["resources"]["limits"].pop("memory"), "limits of cpu and memory"),
        (lambda pod: pod["containers"][0]["env"].append({"name": "HF_TOKEN", "value": "hf_x"}), "from a Secret"),
        (
            lambda pod: pod["containers"][0]["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
            "from a Secret",
        ),
        (lambda pod: pod.update(terminationGracePeriodSeconds=30), "below terminationGracePeriodSeconds 30"),
        (lambda pod: pod.pop("volumes") and pod.update(volumes=[]), "/dev/shm should be an emptyDir in memory"),
    ],
)
def test_every_pod_is_hardened_and_graceful(kind, change, says):
    assert says in refused(kind, lambda document: change(group_of(document)["template"]["spec"]))
    assert says in refused(kind, lambda document: change(head_of(document)["template"]["spec"]))


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN", "AMENABLE_TOKENS", "REDIS_PASSWORD"]
)
def test_what_sounds_like_a_secret_is_taken_for_one_and_nothing_else(name):
    def add(variable: str) -> Callable[[Document], None]:
        return lambda document: container_of(group_of(document))["env"].append({"name": variable, "value": "x"})

    assert f"{name} should come from a Secret" in refused("RayJob", add(name))
    assert refused("RayJob", add("TOKENIZERS_FAST")) == ""


def test_the_submitters_pod_is_hardened_too():
    def change(document: Document) -> None:
        document["spec"]["submitterPodTemplate"]["spec"]["securityContext"] = {}

    assert "the submitter: its pod should run as non-root" in refused("RayJob", change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: head_of(d)["rayStartParams"].pop("num-cpus") and None, 'should have num-cpus: "0"'),
        (
            lambda d: container_of(head_of(d))["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
            "should have no GPU",
        ),
        (lambda d: head_of(d).update(serviceType="LoadBalancer"), "its service should be a ClusterIP"),
    ],
)
def test_the_head_does_no_work_and_is_not_reached_from_outside(change, says):
    assert says in refused("RayJob", change)


@pytest.mark.parametrize("kind", ["RayJob", "RayService", "RayCluster"])
@pytest.mark.parametrize(
    "change",
    [
        lambda g: g["rayStartParams"].pop("object-store-memory") and None,
        lambda g: g["rayStartParams"].update({"object-store-memory": str(100 << 30)}),
        lambda g: g["template"]["spec"]["volumes"][0]["emptyDir"].pop("sizeLimit") and None,
        lambda g: g["template"]["spec"]["volumes"][0]["emptyDir"].update(sizeLimit="2Gi"),
    ],
)
def test_shared_memory_holds_the_object_store_and_what_processes_share(kind, change):
    assert "/dev/shm should have a sizeLimit of" in refused(kind, lambda d: change(group_of(d)))


def test_a_job_that_is_tried_again_must_know_that_it_is():
    def forget(document: Document) -> None:
        container = container_of(head_of(document))
        container["env"] = [each for each in container["env"] if each["name"] != "AMENABLE_ATTEMPT"]

    assert "its head needs AMENABLE_ATTEMPT" in refused("RayJob", forget)
    assert "AMENABLE_ATTEMPT" not in refused("RayJob", all_of(forget, NO_RETRY))


@pytest.mark.parametrize("kind", ["RayService", "RayCluster"])
@pytest.mark.parametrize("part", [head_of, group_of])
def test_where_a_person_tries_again_nothing_says_that_attempts_are_automatic(kind, part):
    def claim(document: Document) -> None:
        container_of(part(document))["env"].append({"name": "AMENABLE_ATTEMPT", "value": "kuberay"})

    assert "AMENABLE_ATTEMPT is for a RayJob alone" in refused(kind, claim)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["spec"]["podMetricsEndpoints"][0].update(port="metric"),
        lambda d: d["spec"]["selector"]["matchLabels"].update({"amenable-run": "another"}),
        lambda d: d["spec"].update(podMetricEndpoints=[]),
        lambda d: d["spec"]["podMetricsEndpoints"][0].update(intervall="30s"),
    ],
)
def test_a_pod_monitor_that_sees_nothing_or_has_a_typo_is_refused(change):
    assert "PodMonitor" in refused("PodMonitor", change)


def test_autoscaling_under_kueue_passes_with_its_annotation():
    found = copy.deepcopy(documents(queue="team"))
    job = one("RayJob", found)
    job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] = True
    job["metadata"]["annotations"] = {"kueue.x-k8s.io/elastic-job": "true"}
    assert problems(found) == []


def policy_of(found: list[Document], name: str) -> Document:
    [policy] = [each["spec"] for each in found if each["metadata"]["name"] == f"hh-8b-{name}"]
    return policy


@pytest.mark.parametrize(
    ("policy", "change", "says"),
    [
        ("operator", lambda spec: spec["ingress"][0]["ports"][0].update(port=8266), "has the port 8266 that it opens"),
        ("clients", lambda spec: spec["ingress"][0]["ports"][0].update(port=8001), "has the port 8001 that it opens"),
        ("metrics", lambda spec: spec["ingress"][0]["ports"][0].update(port=8081), "has the port 8081 that it opens"),
        ("outside", lambda spec: spec["egress"][0]["ports"].pop(), "none lets the pods of head ask for names"),
        ("outside", lambda spec: spec["egress"].pop(0), "none lets the pods of the submitter ask for names"),
        ("outside", lambda spec: spec["egress"][1]["to"][0]["ipBlock"].pop("except"), "service (169.254.169.254)"),
        ("outside", lambda spec: spec["egress"][1]["to"][1]["ipBlock"]["except"].pop(), "service (fd20:ce::254)"),
    ],
)
def test_policies_open_what_is_there_and_names_and_no_metadata(policy, change, says):
    found = copy.deepcopy(documents())
    assert problems(found) == []
    change(policy_of(found, policy))
    assert says in " | ".join(problems(found))


def test_pods_that_no_policy_closes_are_refused():
    def open_up(document: Document) -> None:
        document["spec"]["podSelector"]["matchLabels"]["amenable-run"] = "another"

    found = copy.deepcopy(documents())
    for document in found:
        if document["kind"] == "NetworkPolicy" and "Ingress" in document["spec"]["policyTypes"]:
            open_up(document)
    said = " | ".join(problems(found))
    assert "none closes the pods of learners in both directions" in said
    assert "none closes the pods of the submitter in both directions" in said
