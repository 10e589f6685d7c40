"""A run over two hosts: network namespaces with addresses of their own, one cable between them, and neither /tmp/ray
nor /dev/shm in common. Ray is started there as KubeRay starts it, with its tokens; the hosts share the run's disk.

Needs root, iproute2 and util-linux.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from asked_manifests import documents, one

pytestmark = [pytest.mark.slow, pytest.mark.hosts, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "end_to_end" / "tiny.yaml"
SLOTS = 6 * 32
"""Updates of that recipe, by episodes of each."""

HEAD, WORKER = "10.213.77.1", "10.213.77.2"
CPUS = {HEAD: 1, WORKER: 3}
"""What Ray may hand out: a generator of two CPUs has room on the worker alone, and not all roles have."""

START_LIMIT_S = 300
RUN_LIMIT_S = 1800

NODES = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
give_up = time.monotonic() + float(sys.argv[3])
while (there := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    assert time.monotonic() < give_up, f"{there} nodes"
    time.sleep(0.5)
"""
ANSWERS = "import socket, sys; socket.create_connection((sys.argv[1], 6379), 5)"


def ip(*words: str) -> None:
    """Raises CalledProcessError where the kernel, or this person's rights, do not allow it."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@dataclass
class Host:
    """A network namespace, and what runs in it."""

    name: str
    address: str
    environment: dict[str, str]
    log: Path
    ray: "subprocess.Popen[bytes] | None" = None

    def begin(self, *command: str) -> None:
        """Starts the host's first command, which stays; with memory of its own for Ray's sockets and objects."""
        mounts = "mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && mount -t tmpfs none /dev/shm"
        with self.log.open("wb") as log:
            self.ray = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "sh", "-c", f'{mounts} && exec "$@"', "sh", *command],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def command(self, *words: str) -> "subprocess.Popen[str]":
        """Another command there, as one who is logged in gives it."""
        assert self.ray is not None
        there = ["nsenter", "-t", str(self.ray.pid), "-n", "-m", "sh", "-c", f'cd {ROOT} && exec "$@"', "sh"]
        return subprocess.Popen(
            [*there, *words], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def do(self, *words: str, limit_s: float = 120.0) -> int:
        process = self.command(*words)
        process.communicate(timeout=limit_s)
        return process.returncode

    @property
    def number(self) -> str:
        """The kernel's name of the namespace."""
        return f"net:[{Path('/run/netns', self.name).stat().st_ino}]"


def processes() -> list[tuple[str, psutil.Process]]:
    """All there are, and the network namespace of each."""
    found = []
    for process in psutil.process_iter():
        try:
            found.append((os.readlink(f"/proc/{process.pid}/ns/net"), process))
        except OSError:  # it has ended meanwhile
            continue
    return found


def kuberay_command(group: dict[str, Any], address: str | None, cpus: int) -> list[str]:
    """The command by which KubeRay has a container of the group start Ray (generateRayStartCommand in ray-operator/
    controllers/ray/common/pod.go: what `rayStartParams` lack is filled in, then all of them become flags), with amounts
    that this machine has."""
    parameters = dict(group["rayStartParams"]) | {"num-cpus": str(cpus), "object-store-memory": str(256 << 20)}
    parameters |= {
        "memory": str(4 << 30),
        "block": "true",
        "dashboard-agent-listen-port": "52365",
        "metrics-export-port": "8080",
    }
    role = ["--head"] if address is None else [f"--address={address}:6379"]
    flags = ["--block" if name == "block" else f"--{name}={value}" for name, value in sorted(parameters.items())]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *flags]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Host]]:
    """Both, with Ray started on them, by their addresses."""
    missing = [name for name in ("ip", "nsenter", "mount") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Hosts of their own need root, iproute2 and util-linux; missing: {missing or 'root'}.")
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # as KubeRay gives it, out of a Secret
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    found = {
        address: Host(f"amenable{os.getpid()}{role}", address, environment, home / f"{role}.log")
        for role, address in (("h", HEAD), ("w", WORKER))
    }
    try:
        connect(found[HEAD], found[WORKER])
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        take_down(found)
        pytest.skip(f"This kernel, or these rights, allow no network namespaces: {getattr(error, 'stderr', error)}")
    try:
        cluster = one("RayJob", documents())["spec"]["rayClusterSpec"]
        found[HEAD].begin(*kuberay_command(cluster["headGroupSpec"], None, CPUS[HEAD]))
        until_it_answers(found[HEAD])
        found[WORKER].begin(*kuberay_command(cluster["workerGroupSpecs"][0], HEAD, CPUS[WORKER]))
        wait = [sys.executable, "-c", NODES, f"{HEAD}:6379", "2", str(START_LIMIT_S)]
        assert found[HEAD].do(*wait, limit_s=START_LIMIT_S + 60) == 0, found[WORKER].log.read_text()[-3000:]
        yield found
    finally:
        take_down(found)


def connect(one_host: Host, other: Host) -> None:
    """Makes the hosts and the cable; each is the other's way to the rest of the world, where nothing is."""
    for host in (one_host, other):
        ip("netns", "add", host.name)
    ip("link", "add", "cable", "netns", one_host.name, "type", "veth", "peer", "name", "cable", "netns", other.name)
    for host, far in ((one_host, other), (other, one_host)):
        ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
        for device in ("lo", "cable"):
            ip("-n", host.name, "link", "set", device, "up")
        ip("-n", host.name, "route", "add", "default", "via", far.address)


def until_it_answers(head: Host) -> None:
    give_up = time.monotonic() + START_LIMIT_S
    assert head.ray is not None
    while head.do(sys.executable, "-c", ANSWERS, HEAD) != 0:
        said = head.log.read_text()
        assert head.ray.poll() is None, said[-3000:]
        assert time.monotonic() < give_up, f"no head within {START_LIMIT_S} s: {said[-3000:]}"
        time.sleep(1)


def take_down(hosts: dict[str, Host]) -> None:
    """Ends what runs there, the worker first, and removes the namespaces."""
    for host in reversed(hosts.values()):
        if host.ray is not None and host.ray.poll() is None:
            host.ray.send_signal(signal.SIGTERM)  # ray start --block ends what it has begun
            try:
                host.ray.wait(60)
            except subprocess.TimeoutExpired:
                host.ray.kill()
                host.ray.wait(30)
    for host in hosts.values():
        if Path("/run/netns", host.name).exists():
            left = [process for number, process in processes() if number == host.number]
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=30)
            ip("netns", "delete", host.name)


def roles_by_host(hosts: dict[str, Host]) -> dict[str, set[str]]:
    """The classes of the actors that run now, and the addresses of the hosts they run on."""
    addresses = {host.number: address for address, host in hosts.items()}
    found: dict[str, set[str]] = {}
    for number, process in processes():
        if number not in addresses:
            continue
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:  # it has ended meanwhile
            continue
        if title.startswith("ray::") and not title.startswith("ray::IDLE"):
            found.setdefault(title.removeprefix("ray::").split(".")[0].split()[0], set()).add(addresses[number])
    return found


def test_the_hosts_are_two(hosts):
    assert hosts[WORKER].do(sys.executable, "-c", ANSWERS, HEAD) == 0
    assert hosts[WORKER].do(sys.executable, "-c", ANSWERS, "127.0.0.1") != 0  # which is another machine's there
    assert hosts[HEAD].number != hosts[WORKER].number


def test_a_run_finishes_with_its_generator_on_the_other_host_and_is_accepted(hosts, tmp_path):
    run, seen = tmp_path / "run", {}
    words = ["run", str(RECIPE), "--run", str(run), "--address", f"{HEAD}:6379", "rollouts.threads=2", "--json"]
    process = hosts[HEAD].command(sys.executable, "-m", "amenable", *words)
    give_up = time.monotonic() + RUN_LIMIT_S
    out = err = ""
    while True:
        try:
            out, err = process.communicate(timeout=1.0)
            break
        except subprocess.TimeoutExpired:
            assert time.monotonic() < give_up, f"the run took more than {RUN_LIMIT_S} s"
            for role, there in roles_by_host(hosts).items():
                seen.setdefault(role, set()).update(there)
    assert process.returncode == 0, (out[-2000:], err[-4000:])

    assert json.loads(out)["run"] == yaml.safe_load(RECIPE.read_text())["name"]
    assert seen["RolloutGenerator"] == {WORKER}
    assert set.union(*seen.values()) == {HEAD, WORKER}
    tables = [pq.read_table(path) for path in sorted((run / "round-01" / "ppo" / "episodes").glob("*.parquet"))]
    assert [slot for table in tables for slot in table["slot"].to_pylist()] == list(range(SLOTS))
    assert {name for table in tables for name in table["generator"].to_pylist()} == {"generator-0"}

    audit = hosts[WORKER].command(sys.executable, "-m", "amenable", "audit", str(run), "--json")
    told, problem = audit.communicate(timeout=300)
    assert audit.returncode == 0, problem[-2000:]
    assert json.loads(told)["accepted"]
