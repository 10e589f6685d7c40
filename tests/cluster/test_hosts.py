"""A run on the cluster that its RayJob describes, each pod a host of its own: a network namespace with an address, one
switch between them all, and neither /tmp/ray nor /dev/shm in common.

The manifest is the one that `amenable manifests` writes. Head and workers are started by the commands, in the
environment and with the amounts that KubeRay makes of it, and the job is submitted as KubeRay's submitter does. What a
machine without Kubernetes lacks is put in its place: addresses for the names of services, directories of the test for
the volume and the ConfigMap, this checkout and its environment for the image.

Needs root, iproute2, util-linux and bash.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from asked_manifests import one

from corpus import audit_log

pytestmark = [pytest.mark.slow, pytest.mark.hosts, pytest.mark.timeout(2700)]

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "end_to_end" / "tiny.yaml"
SLOTS = 6 * 32
"""Updates of that recipe, by episodes of each."""

NETWORK = "10.213.77"
HEAD = f"{NETWORK}.1"
DASHBOARD = f"http://{HEAD}:8265"
JOB = "tiny-x7k2p"
"""The submission id, which KubeRay draws."""

START_LIMIT_S = 300
RUN_LIMIT_S = 1800
END_LIMIT_S = 30

NODES = """
import json, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
give_up = time.monotonic() + float(sys.argv[3])
while (there := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    assert time.monotonic() < give_up, f"{there} nodes"
    time.sleep(0.5)
there = {node["NodeManagerAddress"]: node for node in ray.nodes()}
roles = {address: node["Labels"].get("amenable-role", "") for address, node in there.items()}
print(json.dumps({address: [node["Resources"].get("CPU", 0), roles[address]] for address, node in there.items()}))
"""
ANSWERS = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"

Manifest = Mapping[str, Any]


def ip(*words: str) -> None:
    """Raises CalledProcessError where the kernel, or this person's rights, do not allow it."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@dataclass
class Host:
    """A network namespace, and what runs in it."""

    name: str
    address: str
    environment: dict[str, str]
    shm: str
    """Size of its /dev/shm, as mount takes it."""
    log: Path
    first: "subprocess.Popen[bytes] | None" = None

    def begin(self, *command: str) -> None:
        """Starts the host's first command; with memory of its own for Ray's sockets and objects."""
        mounts = f"mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && mount -t tmpfs -o size={self.shm} none /dev/shm"
        with self.log.open("wb") as log:
            self.first = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "sh", "-c", f'{mounts} && exec "$@"', "sh", *command],
                env=self.environment,
                cwd=self.environment["HOME"],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def do(self, *words: str, limit_s: float = 120.0) -> "subprocess.CompletedProcess[str]":
        """Another command there, as `kubectl exec` gives it."""
        assert self.first is not None
        there = ["nsenter", "-t", str(self.first.pid), "-n", "-m", "sh", "-c", 'cd "$HOME" && exec "$@"', "sh"]
        return subprocess.run(
            [*there, *words], env=self.environment, capture_output=True, text=True, timeout=limit_s, check=False
        )

    @property
    def number(self) -> str:
        """The kernel's name of the namespace."""
        return f"net:[{Path('/run/netns', self.name).stat().st_ino}]"


@dataclass(frozen=True)
class Cluster:
    """The hosts, and what of the manifest is not on them."""

    head: Host
    workers: dict[str, Host]
    """By their addresses."""
    submitter: Host
    script: str
    """What the submitter's container runs."""
    cpus: dict[str, int]
    """What the manifest has Ray hand out, by address."""
    groups: dict[str, set[str]]
    """The addresses of each worker group's hosts."""
    run: Path

    @property
    def hosts(self) -> list[Host]:
        return [self.head, *self.workers.values(), self.submitter]


def processes() -> list[tuple[str, psutil.Process]]:
    """All there are, and the network namespace of each."""
    found = []
    for process in psutil.process_iter():
        try:
            found.append((os.readlink(f"/proc/{process.pid}/ns/net"), process))
        except OSError:  # it has ended meanwhile
            continue
    return found


# what KubeRay makes of a RayJob -------------------------------------------------------------------------------------


def size_bytes(quantity: str) -> int:
    """Kubernetes' way to write an amount of memory."""
    return int(quantity.removesuffix("Gi")) << 30


def ray_start(group: Manifest, is_head: bool) -> str:
    """The text that KubeRay gives a container's shell (setMissingRayStartParams, updateRayStartParamsLabels,
    generateRayStartCommand and convertParamMap in ray-operator/controllers/ray/common/pod.go): what `rayStartParams`
    lack is filled in, then all of them become flags, values unquoted."""
    [container] = group["template"]["spec"]["containers"]
    parameters = {"memory": str(size_bytes(container["resources"]["limits"]["memory"]))} | dict(group["rayStartParams"])
    parameters |= {"block": "true", "dashboard-agent-listen-port": "52365", "metrics-export-port": "8080"}
    if "labels" in group:
        parameters["labels"] = ",".join(f"{name}={value}" for name, value in sorted(group["labels"].items()))
    if not is_head:
        parameters["address"] = f"{HEAD}:6379"
    flags = [f" --{name} " if value == "true" else f" --{name}={value} " for name, value in sorted(parameters.items())]
    role = "--head " if is_head else ""
    return f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start {role}{''.join(flags)}"


def variables(group: Manifest, is_head: bool) -> dict[str, str]:
    """The container's variables: the manifest's, then what KubeRay adds (setContainerEnvVars) and Ray reads. Those of
    optional secrets are left out, as Kubernetes does where there is no such secret."""
    [container] = group["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    assert all(each["valueFrom"]["secretKeyRef"]["optional"] for each in container["env"] if "value" not in each)
    added = {
        "RAY_PORT": "6379",
        "RAY_ADDRESS": "127.0.0.1:6379" if is_head else f"{HEAD}:6379",
        "RAY_CLUSTER_NAME": "tiny-fp8wq",
        "RAY_NODE_TYPE_NAME": "headgroup" if is_head else group["groupName"],
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    return added | ({} if is_head else {"FQ_RAY_IP": HEAD, "RAY_IP": HEAD}) | given


def submission(spec: Manifest) -> str:
    """The text that the submitter's shell gets in K8sJobMode (BuildJobSubmitCommand in common/job.go), but for its
    wait until the dashboard answers, which the test has seen already."""
    at = f"--address {DASHBOARD}"
    metadata = json.dumps(json.dumps(spec["metadata"], separators=(",", ":")))
    submit = f"ray job submit {at} --no-wait --metadata-json {metadata} --submission-id {JOB} -- {spec['entrypoint']}"
    return f"if ! ray job status {at} {JOB} >/dev/null 2>&1 ; then {submit} ; fi ; ray job logs {at} --follow {JOB}"


def shell(text: str, options: str = "-cl") -> list[str]:
    """By what KubeRay's containers run their text. Where its operator has ENABLE_LOGIN_SHELL, as here, a login shell,
    which sets a PATH of its own."""
    return ["/bin/bash", options, "--", text]


# the hosts ----------------------------------------------------------------------------------------------------------


def rendered(home: Path) -> list[dict[str, Any]]:
    """What `amenable manifests` writes for the recipe, with directories of the test where its pods have volumes."""
    called = "registry.example/amenable@sha256:" + "0" * 64
    words = ["manifests", str(RECIPE), "--image", called, "--parts", "common,train"]
    written = subprocess.run(
        [sys.executable, "-m", "amenable", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    for there, here in (("/etc/amenable/", f"{home}/config/"), ("/shared/", f"{home}/shared/")):
        assert there in written
        written = written.replace(there, here)
    documents = list(yaml.safe_load_all(written))
    for directory in ("config", "shared"):
        (home / directory).mkdir()
    for name, text in one_recipe(documents).items():
        (home / "config" / name).write_text(text)
    return documents


def one_recipe(documents: list[dict[str, Any]]) -> dict[str, str]:
    """The files of the ConfigMap that the head mounts."""
    [volume] = [
        each["configMap"]["name"]
        for each in one("RayJob", documents)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        if "configMap" in each
    ]
    [found] = [each for each in documents if each["kind"] == "ConfigMap" and each["metadata"]["name"] == volume]
    return found["data"]


def image(home: Path) -> dict[str, str]:
    """The environment of a container before anything is added, and the file by which a login shell finds the program
    (cluster/docker/path.sh), with this environment in the place of the image's."""
    programs = str(Path(sys.executable).parent)
    text = (ROOT / "cluster" / "docker" / "path.sh").read_text(encoding="utf-8")
    (home / ".bash_profile").write_text(text.replace("/opt/amenable/bin", programs))
    ours = ("RAY_", "AMENABLE_", "VLLM_", "HF_", "OMP_", "XDG_")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return outside | {
        "HOME": str(home),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # as KubeRay gives it, out of a Secret
    }


def planned(home: Path) -> Cluster:
    """The hosts of the manifest, none of which is there yet."""
    documents = rendered(home)
    spec = one("RayJob", documents)["spec"]
    given = image(home)
    pods = [spec["rayClusterSpec"]["headGroupSpec"]]
    pods += [group for group in spec["rayClusterSpec"]["workerGroupSpecs"] for _ in range(group["replicas"])]
    hosts = []
    for index, group in enumerate(pods):
        [shm] = [
            each["emptyDir"]["sizeLimit"] for each in group["template"]["spec"]["volumes"] if each["name"] == "shm"
        ]
        name = f"am{os.getpid()}n{index}"
        environment = given | variables(group, is_head=index == 0)
        host = Host(name, f"{NETWORK}.{index + 1}", environment, str(size_bytes(shm)), home / f"{index}.log")
        hosts.append(host)
    submitter = Host(f"am{os.getpid()}s", f"{NETWORK}.{len(pods) + 1}", given, "64m", home / "submitter.log")
    cpus = {host.address: int(group["rayStartParams"]["num-cpus"]) for host, group in zip(hosts, pods, strict=True)}
    run = home / "shared" / "runs" / "tiny"
    assert f"--run {run} " in spec["entrypoint"]
    workers = {each.address: each for each in hosts[1:]}
    groups: dict[str, set[str]] = {}
    for host, group in zip(hosts[1:], pods[1:], strict=True):
        groups.setdefault(group["groupName"], set()).add(host.address)
    found = Cluster(hosts[0], workers, submitter, submission(spec), cpus, groups, run)
    for host, group in zip(hosts, pods, strict=True):
        (home / f"{host.name}.start").write_text(ray_start(group, is_head=host is found.head))
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """All hosts, with Ray started on them but for the submitter's."""
    missing = [name for name in ("ip", "nsenter", "mount", "bash") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Hosts of their own need root, iproute2, util-linux, bash; missing: {missing or 'root'}.")
    home = tmp_path_factory.mktemp("home")
    found = planned(home)
    try:
        connect(found)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        take_down(found)
        pytest.skip(f"This kernel, or these rights, allow no network namespaces: {getattr(error, 'stderr', error)}")
    try:
        for host in (found.head, *found.workers.values()):
            host.begin(*shell((home / f"{host.name}.start").read_text()))
            if host is found.head:
                until_it_answers(host)
        yield found
    finally:
        take_down(found)


def connect(cluster: Cluster) -> None:
    """Makes the hosts, and the switch, which is in the head's namespace; each has another as its way to the rest of the
    world, where nothing is: by that way Ray tells which address is its own."""
    head = cluster.head
    for host in cluster.hosts:
        ip("netns", "add", host.name)
        ip("-n", host.name, "link", "set", "lo", "up")
    ip("-n", head.name, "link", "add", "switch", "type", "bridge")
    ip("-n", head.name, "address", "add", f"{head.address}/24", "dev", "switch")
    ip("-n", head.name, "link", "set", "switch", "up")
    for number, host in enumerate(cluster.hosts[1:]):
        port = f"port{number}"
        ip("link", "add", port, "netns", head.name, "type", "veth", "peer", "name", "cable", "netns", host.name)
        ip("-n", head.name, "link", "set", port, "master", "switch", "up")
        ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
        ip("-n", host.name, "link", "set", "cable", "up")
        ip("-n", host.name, "route", "add", "default", "via", head.address)
    ip("-n", head.name, "route", "add", "default", "via", cluster.submitter.address)


def until_it_answers(head: Host) -> None:
    give_up = time.monotonic() + START_LIMIT_S
    assert head.first is not None
    for port in ("6379", "8265"):
        while head.do(sys.executable, "-c", ANSWERS, HEAD, port).returncode != 0:
            said = head.log.read_text()
            assert head.first.poll() is None, said[-3000:]
            assert time.monotonic() < give_up, (
                f"the head's port {port} did not answer in {START_LIMIT_S} s: {said[-3000:]}"
            )
            time.sleep(1)


def take_down(cluster: Cluster) -> None:
    """Ends what runs there, the head last, and removes the namespaces."""
    for host in reversed(cluster.hosts):
        if host.first is not None and host.first.poll() is None:
            os.killpg(host.first.pid, signal.SIGTERM)  # ray start --block ends what it has begun
    give_up = time.monotonic() + END_LIMIT_S
    for host in reversed(cluster.hosts):
        if not Path("/run/netns", host.name).exists():
            continue
        there = [process for number, process in processes() if number == host.number]
        psutil.wait_procs(there, timeout=max(0.1, give_up - time.monotonic()))
        left = [process for number, process in processes() if number == host.number]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=END_LIMIT_S)
        ip("netns", "delete", host.name)
    for host in cluster.hosts:
        if host.first is not None:
            host.first.wait(END_LIMIT_S)


def roles_by_host(cluster: Cluster) -> dict[str, set[str]]:
    """The classes of the actors that run now, and the job's own command as `driver`, with the addresses of the hosts
    they run on."""
    addresses = {host.number: host.address for host in cluster.hosts}
    found: dict[str, set[str]] = {}
    for number, process in processes():
        if number not in addresses:
            continue
        try:
            words = process.cmdline()
        except psutil.Error:  # it has ended meanwhile
            continue
        title = " ".join(words)
        if words[1:4] == ["-m", "amenable", "run"]:
            found.setdefault("driver", set()).add(addresses[number])
        elif title.startswith("ray::") and not title.startswith("ray::IDLE"):
            found.setdefault(title.removeprefix("ray::").split(".")[0].split()[0], set()).add(addresses[number])
    return found


def test_each_pod_is_a_host_of_its_own_and_the_head_has_no_work_to_hand_out(cluster: Cluster):
    worker = next(iter(cluster.workers.values()))
    assert worker.do(sys.executable, "-c", ANSWERS, HEAD, "6379").returncode == 0
    assert worker.do(sys.executable, "-c", ANSWERS, "127.0.0.1", "6379").returncode != 0  # another machine's there
    assert len({host.number for host in cluster.hosts}) == len(cluster.hosts)
    count = len(cluster.workers) + 1
    wait = [sys.executable, "-c", NODES, f"{HEAD}:6379", str(count), str(START_LIMIT_S)]
    asked = cluster.head.do(*wait, limit_s=START_LIMIT_S + 60)
    assert asked.returncode == 0, (asked.stderr[-2000:], worker.log.read_text()[-3000:])
    roles = {address: group for group, addresses in cluster.groups.items() for address in addresses}
    told = json.loads(asked.stdout.splitlines()[-1])
    assert told == {address: [cpus, roles.get(address, "")] for address, cpus in cluster.cpus.items()}
    assert len(set(roles.values())) == len(cluster.groups) == 3
    assert cluster.cpus[HEAD] == 0


def test_the_job_of_the_manifest_finishes_with_its_roles_on_the_workers_and_is_accepted(cluster: Cluster):
    cluster.submitter.begin(*shell(cluster.script, "-cel"))
    assert cluster.submitter.first is not None
    seen: dict[str, set[str]] = {}
    give_up = time.monotonic() + RUN_LIMIT_S
    while cluster.submitter.first.poll() is None:
        told = cluster.submitter.log.read_text()[-4000:]
        assert time.monotonic() < give_up, f"the job took more than {RUN_LIMIT_S} s: {told}"
        for role, there in roles_by_host(cluster).items():
            seen.setdefault(role, set()).update(there)
        time.sleep(1)
    assert cluster.submitter.first.returncode == 0, cluster.submitter.log.read_text()[-4000:]
    state = cluster.head.do(*shell(f"ray job status --address {DASHBOARD} {JOB}"))
    assert "succeeded" in state.stdout, (state.stdout, cluster.submitter.log.read_text()[-4000:])

    assert seen["driver"] == {HEAD}
    roles = {"learners": "RayTrainWorker", "generators": "RolloutGenerator", "scoring": "ScoringWorker"}
    assert {group: seen[role] for group, role in roles.items()} == cluster.groups
    assert [entry.asked["submission_id"] for entry in audit_log.read(cluster.run)[0] if entry.action == "began"] == [
        JOB
    ]
    tables = [pq.read_table(path) for path in sorted((cluster.run / "round-01/ppo/episodes").glob("*.parquet"))]
    assert [slot for table in tables for slot in table["slot"].to_pylist()] == list(range(SLOTS))
    assert {name for table in tables for name in table["generator"].to_pylist()} == {"generator-0"}

    worker = next(iter(cluster.workers.values()))
    audit = worker.do(sys.executable, "-m", "amenable", "audit", str(cluster.run), "--json", limit_s=300)
    assert audit.returncode == 0, audit.stderr[-2000:]
    assert json.loads(audit.stdout)["accepted"]
