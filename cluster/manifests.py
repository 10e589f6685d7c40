"""Kubernetes manifests of a run: the bases of cluster/k8s, filled in from its plan. Pure: documents in, documents out.

The bases are whole manifests, those of the packaged demo, which kustomize overlays build on too. What depends on a run
is put in place here: names, labels, image, worker groups, the recipe, deadlines and grace.
"""

import copy
import hashlib
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

from cluster.egress import ports_outside, rules_inside, server_of
from cluster.worker_groups import WorkerGroup
from corpus.storage import is_object_store

Document = dict[str, Any]

Part = Literal["storage", "common", "train", "serve", "interactive"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The volume's claim; what the pods of all others stand on; the RayJob; the RayService; the RayCluster. Each can be
deleted as it was applied: none but `storage` takes the runs with it, none but `common` what another part needs."""

BASES: dict[Part, tuple[str, ...]] = {
    "storage": ("storage/claim.yaml",),
    "common": (
        "base/serviceaccount.yaml",
        "base/recipe.yaml",
        "base/networkpolicies.yaml",
        "base/podmonitor.yaml",
    ),
    "train": ("base/rayjob.yaml",),
    "serve": ("serve/rayservice.yaml",),
    "interactive": ("interactive/raycluster.yaml",),
}

BASE_RUN = "demo"
RUN_LABEL = "amenable-run"
ROLE_LABEL = "amenable-role"
"""Of pods in Kubernetes, and of the worker groups of training in Ray."""
SHARED = "/shared"
RECIPE_FILE = "/etc/amenable/recipe.yaml"
TOKEN_FILE = "/etc/amenable-serving/tokens.json"
SECRETS = "amenable-secrets"
MIRROR = "/mirror"
"""Where pods of the endpoint have what they serve of a run in an object store."""
LONGEST_NAME = 47 - len("-serve")
"""KubeRay's longest name of a RayJob or RayService, less what is put behind a run's."""

DRAIN_MARGIN_S = 60
"""Seconds that Ray's drain has over the time of a checkpoint, and Kubernetes' grace over the drain. House default."""

HEAD_GIB = 4
"""Memory of the head beside its object store and what is read from there: Ray's own processes, and the driver. An
assumption."""

SPOT_TOLERATIONS = (
    {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Exists", "effect": "NoSchedule"},
)
_STORE_KEYS = {"secretRef": {"name": "amenable-object-store", "optional": True}}
GPU_TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


@dataclass(frozen=True)
class RunManifests:
    """What the manifests of one run say."""

    run: str
    recipe: str
    """The resolved recipe, YAML."""
    recipe_hash: str
    image: str
    run_directory: str
    """Where the run is kept, as its pods see it: below /shared, or an address in an object store."""
    claim: str
    """The PersistentVolumeClaim that is mounted at /shared."""
    groups: Sequence[WorkerGroup]
    serving: WorkerGroup
    """The pods of the live endpoint."""
    replicas: tuple[int, int]
    """Fewest and most replicas of the endpoint."""
    concurrent_requests: int
    """Requests under way in a replica above which another one is started."""
    checkpoint_s: float
    """Longest time of a checkpoint, seconds: what is drained waits for it."""
    deadline_s: int
    queue: str | None = None
    """Kueue's queue."""
    spot: bool = True
    """Whether generators may run where machines are taken away."""
    monitoring: bool = False
    """Whether alerts and dashboard are written too."""
    addresses: Sequence[str] = ()
    """What training reads or asks in the network beside the run itself: web addresses, and those in object stores."""
    secret_variables: Sequence[str] = ()
    """Environment variables that the training needs, each from the key of SECRETS that is called like it."""

    @property
    def name(self) -> str:
        """The run's name as Kubernetes takes it."""
        return kubernetes_name(self.run)

    @property
    def is_stored(self) -> bool:
        """Whether an object store keeps the run."""
        return not self.run_directory.startswith(f"{SHARED}/")

    @property
    def reads_a_store(self) -> bool:
        """Whether the training goes to an object store."""
        return self.is_stored or any(map(is_object_store, self.addresses))


def kubernetes_name(run: str) -> str:
    """A DNS-1035 label for a run: lower case, digits and hyphens, a letter first. A name that had to be changed so that
    another run could come out the same, or to be cut, ends with six digits of its hash."""
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")
    if plain == run and len(plain) <= LONGEST_NAME:
        return plain
    digest = hashlib.sha256(run.encode()).hexdigest()[:6]
    return f"{plain[: LONGEST_NAME - 7].rstrip('-')}-{digest}"


def base_documents(parts: Collection[Part] = PARTS) -> list[Document]:
    """The bases of `parts`, as they are packaged, in the order in which they are to be applied."""
    import yaml

    folder = resources.files("cluster").joinpath("k8s")
    found: list[Document] = []
    for path in (path for part in PARTS if part in parts for path in BASES[part]):
        text = folder.joinpath(*path.split("/")).read_text(encoding="utf-8")
        found += [each for each in yaml.safe_load_all(text) if each]
    return found


def render(asked: RunManifests, parts: Collection[Part] = PARTS) -> list[Document]:
    """The manifests of `parts` of the run, in the order in which they are to be applied."""
    found = []
    for base in base_documents(parts):
        document = _renamed(copy.deepcopy(base), asked.name)
        kind = document["kind"]
        found.append(_FILLED[kind](document, asked) if kind in _FILLED else document)
    return found + (monitoring() if asked.monitoring else [])


def monitoring() -> list[Document]:
    """The alerts as a PrometheusRule, and the dashboard as a ConfigMap for Grafana's sidecar. They are of no run in
    particular, so that several runs in a namespace share them."""
    import yaml

    folder = resources.files("cluster").joinpath("observability")
    rules = yaml.safe_load(folder.joinpath("alerts.yaml").read_text(encoding="utf-8"))
    dashboard = folder.joinpath("dashboard.json").read_text(encoding="utf-8")
    return [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "amenable-alerts", "labels": {"app.kubernetes.io/name": "amenable"}},
            "spec": rules,
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": "amenable-dashboard",
                "labels": {"app.kubernetes.io/name": "amenable", "grafana_dashboard": "1"},
            },
            "data": {"amenable.json": dashboard},
        },
    ]


def entrypoint(asked: RunManifests) -> str:
    """The command of the training job."""
    return f"python -m amenable run {RECIPE_FILE} --run {shlex.quote(asked.run_directory)} --address auto"


def _renamed(value: Any, name: str, key: str = "") -> Any:
    """`value` with the base's run replaced wherever it stands as a name or a label of ours."""
    if isinstance(value, dict):
        return {each: _renamed(inner, name, each) for each, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, name, key) for inner in value]
    if key in ("name", "run", "serviceAccountName", RUN_LABEL) and isinstance(value, str):
        head, separator, rest = value.partition("-")
        return f"{name}{separator}{rest}" if head == BASE_RUN else value
    return value


def _claim(document: Document, asked: RunManifests) -> Document:
    document["metadata"]["name"] = asked.claim
    return document


def _recipe(document: Document, asked: RunManifests) -> Document:
    document["data"]["recipe.yaml"] = asked.recipe
    return document


def _policy(document: Document, asked: RunManifests) -> Document:
    if document["metadata"]["name"] == f"{asked.name}-outside":
        named = [*asked.addresses, *([asked.run_directory] if asked.is_stored else [])]
        servers = [server for server in map(server_of, named) if server is not None]
        rules = document["spec"]["egress"]
        rules[-1]["ports"] = ports_outside(servers)
        rules += rules_inside(servers)
    return document


def _job(document: Document, asked: RunManifests) -> Document:
    spec = document["spec"]
    spec["entrypoint"] = entrypoint(asked)
    spec["metadata"] = {"run": asked.run, "recipe": asked.recipe_hash}
    spec["activeDeadlineSeconds"] = asked.deadline_s
    if asked.queue is not None:
        document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = asked.queue
    for container in spec["submitterPodTemplate"]["spec"]["containers"]:
        container["image"] = asked.image
    _cluster(spec["rayClusterSpec"], asked, asked.groups)
    _trains(spec["rayClusterSpec"], asked)
    return document


def _service(document: Document, asked: RunManifests) -> Document:
    import yaml

    spec = document["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    [application] = config["applications"]
    application["args"] |= {"run": asked.run_directory, "token_file": TOKEN_FILE}
    [deployment] = application["deployments"]
    deployment["user_config"]["run"] = asked.run_directory
    fewest, most = asked.replicas
    if most > fewest:
        del deployment["num_replicas"]
        deployment["autoscaling_config"] = {
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": max(1, asked.concurrent_requests // 2),
        }
    else:
        deployment["num_replicas"] = fewest
    spec["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)
    _cluster(spec["rayClusterConfig"], asked, [asked.serving])
    if asked.is_stored:
        cluster = spec["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            _mirrored(group["template"]["spec"])
    return document


def _mirrored(pod: Document) -> None:
    """A pod that reads the run from its object store, into a volume of its own in place of the shared one."""
    volume = _volume(pod, "runs")
    volume.clear()
    volume |= {"name": "mirror", "emptyDir": {}}  # outlives the container, so that weights are not fetched again
    for container in pod["containers"]:
        for mount in container["volumeMounts"]:
            if mount["name"] == "runs":
                mount |= {"name": "mirror", "mountPath": MIRROR}
        for variable in container["env"]:
            if variable["name"] == "AMENABLE_WORKING_COPIES":
                variable["value"] = MIRROR


def _interactive(document: Document, asked: RunManifests) -> Document:
    """The training cluster's groups without a pod: a person scales the ones that are wanted."""
    _cluster(document["spec"], asked, asked.groups)
    _trains(document["spec"], asked)
    for group in document["spec"]["workerGroupSpecs"]:
        group |= {"replicas": 0, "minReplicas": 0}
    return document


_FILLED = {
    "PersistentVolumeClaim": _claim,
    "ConfigMap": _recipe,
    "NetworkPolicy": _policy,
    "RayJob": _job,
    "RayService": _service,
    "RayCluster": _interactive,
}


def _cluster(spec: Document, asked: RunManifests, groups: Sequence[WorkerGroup]) -> None:
    """Fills in a cluster: its head as the base has it, and `groups` made after the base's first."""
    head = spec["headGroupSpec"]
    _pod(head["template"]["spec"], asked)
    # Actors that ask for no CPU may be placed on the head where a recipe names no labels, as in a cluster for jobs of
    # any: the weight store, with its snapshots, is one.
    store_gib = max(group.object_store_gib for group in groups)
    _object_store(head["rayStartParams"], head["template"]["spec"], store_gib, store_gib + 1)
    [container] = head["template"]["spec"]["containers"]
    for amounts in container["resources"].values():
        amounts["memory"] = f"{HEAD_GIB + 2 * store_gib}Gi"
    model = spec["workerGroupSpecs"][0]
    spec["workerGroupSpecs"] = [_worker_group(copy.deepcopy(model), asked, group) for group in groups]


def _trains(spec: Document, asked: RunManifests) -> None:
    """Gives the pods of a training cluster, by reference, the secrets that the recipe asks for. A pod waits for a key
    that is not there; keys of a store are its own affair, which may let pods in without any."""
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            if asked.reads_a_store:
                container["envFrom"] = [copy.deepcopy(_STORE_KEYS)]
            known = {variable["name"] for variable in container["env"]}
            container["env"] += [
                {"name": name, "valueFrom": {"secretKeyRef": {"name": SECRETS, "key": secret_key(name)}}}
                for name in asked.secret_variables
                if name not in known
            ]


def secret_key(variable: str) -> str:
    """The key of SECRETS that holds the value of an environment variable."""
    return variable.lower().replace("_", "-")


def _worker_group(made: Document, asked: RunManifests, group: WorkerGroup) -> Document:
    fewest = group.pods
    made |= {"groupName": group.name, "replicas": group.pods, "minReplicas": fewest, "maxReplicas": group.most_pods}
    made["rayStartParams"] = {"num-cpus": str(group.ray_cpus)}
    made["template"]["metadata"]["labels"][ROLE_LABEL] = group.name
    # A base's group has the labels that its own role asks for.
    made.pop("labels", None)
    if group.labels:
        made["labels"] = dict(group.labels)
    pod = made["template"]["spec"]
    _pod(pod, asked)
    [container] = pod["containers"]
    amounts = {"cpu": str(group.cpus), "memory": f"{group.memory_gib}Gi"}
    if group.gpus:
        amounts["nvidia.com/gpu"] = str(group.gpus)
    container["resources"] = {"requests": dict(amounts), "limits": dict(amounts)}
    _object_store(made["rayStartParams"], pod, group.object_store_gib, group.shared_memory_gib)
    tolerations = [GPU_TOLERATION] if group.gpus else []
    if group.is_spot_allowed and asked.spot:
        tolerations += SPOT_TOLERATIONS
    if tolerations:
        pod["tolerations"] = [dict(each) for each in tolerations]
    return made


def _pod(pod: Document, asked: RunManifests) -> None:
    drain_s = round(asked.checkpoint_s) + DRAIN_MARGIN_S
    pod["terminationGracePeriodSeconds"] = drain_s + DRAIN_MARGIN_S
    _volume(pod, "runs")["persistentVolumeClaim"]["claimName"] = asked.claim
    for container in pod["containers"]:
        container["image"] = asked.image
        for variable in container["env"]:
            if variable["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S":
                variable["value"] = str(drain_s)
        if asked.is_stored:
            # Every pod must see the working copy: learners write there what the driver commits.
            container["env"].append({"name": "AMENABLE_WORKING_COPIES", "value": f"{SHARED}/working-copies"})
            container["envFrom"] = [copy.deepcopy(_STORE_KEYS)]


def _object_store(start: Document, pod: Document, size_gib: int, shared_gib: int) -> None:
    """Ray's object store, and /dev/shm, which it lies in."""
    start["object-store-memory"] = str(size_gib << 30)
    _volume(pod, "shm")["emptyDir"]["sizeLimit"] = f"{shared_gib}Gi"


def _volume(pod: Mapping[str, Any], name: str) -> Document:
    return next(volume for volume in pod["volumes"] if volume["name"] == name)
