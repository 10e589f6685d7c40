"""The image: its Dockerfile linted and read, the step that makes its wheel run in a clean directory, the wheel tried
outside a checkout.

No image is built here: that needs a container engine and a registry.
"""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
IGNORED = (FOLDER / "Dockerfile.dockerignore").read_text()
SCRIPTS = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2].partition("\n\n")[0].splitlines()
DEADLINE_S = 280


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


def run(*words: str, cwd: Path, **environment: str) -> str:
    """Standard output of a command, which must succeed."""
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=DEADLINE_S
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


# its build steps, and what comes of them ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_of_the_image_runs_outside_the_checkout(tmp_path):
    """The steps that make the wheel stage, run as they stand; then the same from the source distribution."""
    source = context(tmp_path / "source")
    [step] = [rest for word, rest in stages(DOCKERFILE)["wheel"] if word == "RUN"]
    words = shlex.split(step.replace("/wheels", str(tmp_path / "wheels")))
    words[0] = sys.executable
    run(*words, cwd=source, PIP_NO_BUILD_ISOLATION="0")  # the backend is here, and nothing is to be downloaded
    check_wheel(next((tmp_path / "wheels").glob("amenable-*.whl")), tmp_path / "installed")


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
    kinds = {document["kind"] for document in yaml.safe_load_all(program("-m", "amenable", "manifests", "demo"))}
    assert {"RayJob", "RayService", "RayCluster", "NetworkPolicy"} <= kinds
    assert "h100-80gb" in program("-m", "amenable", "plan", "paper", "--model", "gpt3-1.3b")
    for overlay in ("cpu-kind", "single-node-gpu", "multi-node-gpu"):
        assert (installed / "cluster" / "k8s" / "overlays" / overlay / "kustomization.yaml").is_file()
