"""What KubeRay's controller and a careful operator demand of manifests beyond their schema. Pure.

The controller's rules are those of KubeRay 1.7's validation (ray-operator/controllers/ray/utils/validation.go); it
refuses what breaks them only once it is applied. The others are this project's own: hardened pods, secrets by
reference, a head without work, and a grace that a checkpoint fits into.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

Manifest = Mapping[str, Any]

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
FIRST_RAY_WITH_TOKENS = (2, 52)
MOST_GROUPS_UNDER_KUEUE = 17
KUEUE = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
START_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}
WRITTEN = {"/tmp", "/home/amenable"}
"""What programs write to beside /dev/shm and the run: Ray's session and temporary files; caches in the image's home."""
PROBES = {"livenessProbe", "readinessProbe", "startupProbe"}
DNS = {("UDP", 53), ("TCP", 53)}
METADATA = tuple(map(ip_address, ("169.254.169.254", "fd00:ec2::254", "fd20:ce::254")))
"""Where clouds' metadata services answer, which hand out a machine's credentials."""
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
ATTEMPT = "AMENABLE_ATTEMPT"
SERVE = "serve"
SECRET_NAME = re.compile(r"(^|_)(TOKENS?|SECRETS?|PASSWORD|CREDENTIALS?|API_?KEY|ACCESS_KEY)(_|$)")

POD_MONITOR_KEYS = {"selector", "podMetricsEndpoints", "namespaceSelector", "jobLabel", "podTargetLabels"}
RULE_KEYS = {"alert", "expr", "for", "keep_firing_for", "labels", "annotations"}
GROUP_KEYS = {"name", "interval", "limit", "rules"}
ENDPOINT_KEYS = {"port", "path", "interval", "scrapeTimeout", "relabelings", "metricRelabelings"}


def problems(documents: Sequence[Manifest]) -> list[str]:
    """What is wrong with these manifests, a sentence each; [] where nothing is."""
    found = []
    for document in documents:
        check = _CHECKS.get(document.get("kind", ""))
        if check is not None:
            where = f"{document['kind']} {document['metadata']['name']}"
            found += [f"{where}: {problem}" for problem in check(document)]
    return found + [f"PodMonitor {problem}" for problem in _monitoring(documents)] + list(_isolation(documents))


def clusters(documents: Sequence[Manifest]) -> Iterator[Manifest]:
    """The specification of every Ray cluster in the documents."""
    for document in documents:
        spec = _cluster_of(document)
        if spec is not None:
            yield spec


def pods(cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    """(group, template) of every pod of a cluster; the head's group is "head"."""
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group["template"]


# KubeRay's rules ---------------------------------------------------------------------------------------------------


def _job(document: Manifest) -> Iterator[str]:
    spec = document["spec"]
    selects, retries = bool(spec.get("clusterSelector")), spec.get("backoffLimit", 0) > 0
    mode = spec.get("submissionMode", "K8sJobMode")
    shuts_down, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    rules = spec.get("deletionStrategy", {}).get("deletionRules")
    yield from _name(document)
    if not selects and "rayClusterSpec" not in spec:
        yield "it needs rayClusterSpec or clusterSelector"
    if selects and (retries or spec.get("suspend") or mode == "SidecarMode"):
        yield "with clusterSelector there is no backoffLimit above 0, no suspend and no SidecarMode"
    if ttl > 0 and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if rules and (shuts_down or ttl > 0):
        yield "deletionRules exclude shutdownAfterJobFinishes and ttlSecondsAfterFinished"
    if spec.get("suspend") and not shuts_down:
        yield "suspend needs shutdownAfterJobFinishes: true"
    if mode == "InteractiveMode" and retries:
        yield "InteractiveMode has no backoffLimit above 0"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "SidecarMode has neither submitterPodTemplate nor submitterConfig"
    yield from _kueue(document, shuts_down, rules)
    if "rayClusterSpec" in spec:
        yield from _cluster(spec["rayClusterSpec"])
        if retries and ATTEMPT not in _environment(spec["rayClusterSpec"]["headGroupSpec"]["template"]):
            yield f"its head needs {ATTEMPT}, or every retry would run a recipe that is wrong for good"
    if "submitterPodTemplate" in spec:
        yield from _hardened("the submitter", spec["submitterPodTemplate"])


def _kueue(document: Manifest, shuts_down: bool, rules: Any) -> Iterator[str]:
    if KUEUE not in document["metadata"].get("labels", {}):
        return
    cluster = document["spec"].get("rayClusterSpec", {})
    groups = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
    if cluster.get("enableInTreeAutoscaling") and document["metadata"].get("annotations", {}).get(ELASTIC) != "true":
        yield f'under Kueue autoscaling needs the annotation {ELASTIC}: "true"'
    if not shuts_down or rules:
        yield "under Kueue it needs shutdownAfterJobFinishes: true, without deletionRules"
    if len(groups) > MOST_GROUPS_UNDER_KUEUE or "head" in groups:
        yield f"Kueue takes at most {MOST_GROUPS_UNDER_KUEUE} worker groups, none of them called head"


def _service(document: Manifest) -> Iterator[str]:
    spec = document["spec"]
    yield from _name(document)
    yield from _cluster(spec["rayClusterConfig"])
    yield from _attended(spec["rayClusterConfig"])
    [head, *workers] = [_ports(template) for _, template in pods(spec["rayClusterConfig"])]
    if SERVE not in head:
        yield f"its head needs a port called {SERVE}, of which KubeRay makes the endpoint's Service"
    elif any(head[SERVE] != ports.get(SERVE) for ports in workers):
        yield f"the port {SERVE} of its head should be that of its workers, which answer there"


def _ray_cluster(document: Manifest) -> Iterator[str]:
    yield from _name(document)
    yield from _cluster(document["spec"])
    yield from _attended(document["spec"])


def _attended(cluster: Manifest) -> Iterator[str]:
    if any(ATTEMPT in _environment(template) for _, template in pods(cluster)):
        yield f"{ATTEMPT} is for a RayJob alone: here a person tries again, who must not be refused"


def _name(document: Manifest) -> Iterator[str]:
    name, longest = document["metadata"]["name"], LONGEST_NAME[document["kind"]]
    if len(name) > longest or not NAME.fullmatch(name):
        yield f"its name must be at most {longest} lower-case letters, digits and hyphens, a letter first"


def _cluster(spec: Manifest) -> Iterator[str]:
    head, autoscales = spec["headGroupSpec"], spec.get("enableInTreeAutoscaling", False)
    if "networkPolicy" in spec:
        yield "its networkPolicy is alpha; plain NetworkPolicies hold with every version"
    is_v2 = spec.get("autoscalerOptions", {}).get("version") == "v2"
    if spec.get("authOptions", {}).get("mode") == "token" and _version(spec) < FIRST_RAY_WITH_TOKENS:
        yield "token authentication needs rayVersion 2.52 or newer"
    for group in [head, *spec.get("workerGroupSpecs", [])]:
        name = group.get("groupName", "head")
        given, parameters = group.get("resources", {}), group.get("rayStartParams", {})
        if given and parameters.keys() & START_RESOURCES:
            yield f"{name}: resources stand in rayStartParams and in resources, where KubeRay takes one of them"
        if "labels" in parameters:
            yield f"{name}: labels stand in rayStartParams, where KubeRay takes none"
        if name != "head" and not autoscales and not {"minReplicas", "maxReplicas"} <= group.keys():
            yield f"{name}: minReplicas and maxReplicas are mandatory without autoscaling"
        fewest, most = group.get("minReplicas", 0), group.get("maxReplicas", 0)
        if name != "head" and not fewest <= group.get("replicas", 0) <= most:
            yield f"{name}: replicas must be between minReplicas and maxReplicas"
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if autoscales and is_v2 and policy != "Never":
            yield f"{name}: autoscaler v2 needs restartPolicy Never, or none"
        for container in group["template"]["spec"]["containers"]:
            if container.keys() & PROBES:
                yield f"{name}: {container['name']} has a probe of its own in place of KubeRay's"
        yield from _hardened(name, group["template"])
        yield from _graceful(name, group["template"])
        yield from _shared_memory(name, group)
    if "gcsFaultToleranceOptions" in spec and _environment(head["template"]).keys() & {
        "RAY_REDIS_ADDRESS",
        "REDIS_PASSWORD",
    }:
        yield "with gcsFaultToleranceOptions there is no RAY_REDIS_ADDRESS or REDIS_PASSWORD in the environment"
    yield from _idle_head(head)


def _version(spec: Manifest) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", str(spec.get("rayVersion", "")))
    return tuple(int(part) for part in found.groups()) if found else (0, 0)


# this project's ----------------------------------------------------------------------------------------------------


def _idle_head(head: Manifest) -> Iterator[str]:
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'head: rayStartParams should have num-cpus: "0", so that no role is placed there'
    for container in head["template"]["spec"]["containers"]:
        if "nvidia.com/gpu" in container.get("resources", {}).get("limits", {}):
            yield "head: it should have no GPU"
    if head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield "head: its service should be a ClusterIP"


def _hardened(name: str, template: Manifest) -> Iterator[str]:
    spec = template["spec"]
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name}: its pod should run as non-root under seccomp's RuntimeDefault"
    if spec.get("automountServiceAccountToken") is not False:
        yield f"{name}: its pod should not be given a service account's token"
    if spec.get("hostNetwork") or spec.get("hostPID") or spec.get("hostIPC"):
        yield f"{name}: its pod should not share the node's namespaces"
    if any("hostPath" in volume for volume in spec.get("volumes", [])):
        yield f"{name}: its pod should mount nothing of the node (hostPath)"
    if "fsGroup" in security and security.get("fsGroupChangePolicy") != "OnRootMismatch":
        yield (
            f"{name}: fsGroup should have fsGroupChangePolicy OnRootMismatch, or each pod would go through every file "
            "of the volume before it starts"
        )
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        own = container.get("securityContext", {})
        may_escalate = own.get("allowPrivilegeEscalation") is not False or own.get("privileged")
        if may_escalate or "ALL" not in own.get("capabilities", {}).get("drop", []):
            yield f"{name}: its container {container['name']} should drop ALL capabilities and not escalate"
        written = {m["mountPath"] for m in container.get("volumeMounts", []) if not m.get("readOnly")}
        if own.get("readOnlyRootFilesystem") is not True or not written >= WRITTEN:
            yield (
                f"{name}: its container {container['name']} should have a readOnlyRootFilesystem, with volumes at "
                f"{' and '.join(sorted(WRITTEN))}"
            )
        if not container.get("resources", {}).get("limits", {}).keys() >= {"cpu", "memory"}:
            yield f"{name}: its container {container['name']} should have limits of cpu and memory"
        for variable in container.get("env", []):
            if "value" in variable and SECRET_NAME.search(variable["name"]):
                yield f"{name}: {variable['name']} should come from a Secret (secretKeyRef), not stand in the manifest"


def _graceful(name: str, template: Manifest) -> Iterator[str]:
    drain_s = float(_environment(template).get(DRAIN) or 0)
    grace_s = template["spec"].get("terminationGracePeriodSeconds", 30)
    if not 0 < drain_s < grace_s:
        yield f"{name}: {DRAIN} {drain_s:g} should be above 0 and below terminationGracePeriodSeconds {grace_s}"
    mounted = {
        mount["name"]
        for container in template["spec"]["containers"]
        for mount in container.get("volumeMounts", [])
        if mount["mountPath"] == "/dev/shm"
    }
    in_memory = {
        v["name"] for v in template["spec"].get("volumes", []) if v.get("emptyDir", {}).get("medium") == "Memory"
    }
    if not mounted & in_memory:
        yield f"{name}: /dev/shm should be an emptyDir in memory: Ray's object store is there"


def _shared_memory(name: str, group: Manifest) -> Iterator[str]:
    """/dev/shm holds Ray's object store, which else goes to a disk, and a GiB for each process on a GPU."""
    store = int(group.get("rayStartParams", {}).get("object-store-memory", 0)) / (1 << 30)
    gpus = max(
        int(container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))
        for container in group["template"]["spec"]["containers"]
    )
    sizes = [v["emptyDir"] for v in group["template"]["spec"].get("volumes", []) if v["name"] == "shm"]
    found = re.fullmatch(r"(\d+)Gi", str(sizes[0].get("sizeLimit"))) if sizes else None
    least = store + max(1, gpus)
    if not store or found is None or int(found[1]) < least:
        yield f"{name}: /dev/shm should have a sizeLimit of {least:g}Gi or more: its object-store-memory, a GiB a GPU"


def _environment(template: Manifest) -> dict[str, Any]:
    return {
        variable["name"]: variable.get("value")
        for container in template["spec"]["containers"]
        for variable in container.get("env", [])
    }


def _monitoring(documents: Sequence[Manifest]) -> Iterator[str]:
    templates = [template for spec in clusters(documents) for _, template in pods(spec)]
    for document in documents:
        if document.get("kind") != "PodMonitor":
            continue
        name, spec = document["metadata"]["name"], document["spec"]
        if not spec.keys() <= POD_MONITOR_KEYS or any(not e.keys() <= ENDPOINT_KEYS for e in _endpoints(spec)):
            yield f"{name}: it has a key that is none of a PodMonitor"
        watched = [each for each in templates if _selects(spec.get("selector", {}), each)]
        ports = {port for each in watched for port in _ports(each)}
        for endpoint in _endpoints(spec):
            if templates and endpoint.get("port") not in ports:
                yield f"{name}: no pod that it selects has a port {endpoint.get('port')}"


def _alerts(document: Manifest) -> Iterator[str]:
    spec = document["spec"]
    groups = spec.get("groups", [])
    if not spec.keys() <= {"groups"} or any(not group.keys() <= GROUP_KEYS for group in groups):
        yield "it has a key that is none of a PrometheusRule"
    for rule in (rule for group in groups for rule in group.get("rules", [])):
        if not rule.keys() <= RULE_KEYS or not {"alert", "expr"} <= rule.keys():
            yield f"{rule.get('alert', 'a rule')} has a key that is none of an alert, or lacks alert or expr"


def _endpoints(spec: Manifest) -> Sequence[Manifest]:
    return spec.get("podMetricsEndpoints", [])


def _isolation(documents: Sequence[Manifest]) -> Iterator[str]:
    """Every pod of ours is closed in both directions by some policy, and may ask for names; what a policy opens inwards
    is a port that its pods have, and nothing opens the way to a cloud's metadata service."""
    policies = [each for each in documents if each.get("kind") == "NetworkPolicy"]
    templates = [(name, template) for spec in clusters(documents) for name, template in pods(spec)]
    templates += [
        ("the submitter", each["spec"]["submitterPodTemplate"])
        for each in documents
        if "submitterPodTemplate" in each.get("spec", {})
    ]
    for name, template in templates:
        closed = {
            direction
            for policy in policies
            if _selects(policy["spec"]["podSelector"], template)
            for direction in policy["spec"].get("policyTypes", [])
        }
        if closed != {"Ingress", "Egress"}:
            yield f"NetworkPolicy: none closes the pods of {name} in both directions"
        own = [policy["spec"] for policy in policies if _selects(policy["spec"]["podSelector"], template)]
        outwards = {port for spec in own for rule in spec.get("egress", []) for port in _opened(rule)}
        if not outwards >= DNS:
            yield f"NetworkPolicy: none lets the pods of {name} ask for names (UDP and TCP 53)"
    for policy in policies:
        spec, called = policy["spec"], f"NetworkPolicy {policy['metadata']['name']}"
        selected = [template for _, template in templates if _selects(spec["podSelector"], template)]
        there = {port for template in selected for port in _ports(template).values()}
        for _, port in (port for rule in spec.get("ingress", []) for port in _opened(rule)):
            if selected and port not in there:
                yield f"{called}: no pod that it selects has the port {port} that it opens"
        for block in (to["ipBlock"] for rule in spec.get("egress", []) for to in rule.get("to", []) if "ipBlock" in to):
            reached = [str(each) for each in METADATA if _is_in(each, block)]
            if reached:
                yield f"{called}: it opens the way to a cloud's metadata service ({', '.join(reached)})"


def _opened(rule: Manifest) -> list[tuple[str, int]]:
    return [(each.get("protocol", "TCP"), each["port"]) for each in rule.get("ports", [])]


def _is_in(address: IPv4Address | IPv6Address, block: Manifest) -> bool:
    return address in ip_network(block["cidr"]) and not any(
        address in ip_network(each) for each in block.get("except", [])
    )


def _ports(template: Manifest) -> dict[str, int]:
    """The named ports of a pod's containers."""
    return {
        port["name"]: port["containerPort"]
        for container in template["spec"]["containers"]
        for port in container.get("ports", [])
    }


def _selects(selector: Manifest, template: Manifest) -> bool:
    labels = template["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _cluster_of(document: Manifest) -> Manifest | None:
    spec = document.get("spec", {})
    return {
        "RayCluster": spec,
        "RayJob": spec.get("rayClusterSpec"),
        "RayService": spec.get("rayClusterConfig"),
    }.get(document.get("kind", ""))


_CHECKS: dict[str, Callable[[Manifest], Iterator[str]]] = {
    "RayJob": _job,
    "RayService": _service,
    "RayCluster": _ray_cluster,
    "PrometheusRule": _alerts,
}
