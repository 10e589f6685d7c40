"""What travels with a job is what Ray's own packing takes, and what does not fit or is missing is told before."""

import zipfile
from pathlib import Path

import pytest

from cluster.working_directory import (
    EXCLUDES,
    PackedFile,
    WorkingDirectory,
    check_fits,
    check_has,
    packed_bytes,
    travelling,
    upload_limit_bytes,
)
from corpus.problems import UsageProblem


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with code, a recipe, results, secrets, ignore files and odd names."""
    files = {
        "recipes/x.yaml": "name: x",
        "learners/ppo.py": "pass",
        "größe.txt": "ü" * 300,
        "runs/x/policy.safetensors": "w" * 5000,
        ".env": "HF_TOKEN=zq7-canary",
        "keys/server.pem": "-----BEGIN",
        ".git/config": "[core]",
        "__pycache__/a.pyc": "x",
        ".gitignore": "*.log\nscratch/\n",
        "train.log": "x",
        "scratch/x.txt": "x",
        "data/.rayignore": "big.bin\n",
        "data/big.bin": "x" * 100,
        "data/small.txt": "x",
        "notes/build/x": "x",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "empty").mkdir()
    return tmp_path


def packed_by_ray(root: Path, target: Path, excludes: tuple[str, ...]) -> Path:
    """The package as Ray's client makes it."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    wanted = [*get_runtime_env_default_excludes(), *excludes]
    create_package(str(root), target, include_gitignore=True, excludes=wanted)
    return target


@pytest.mark.parametrize("excludes", [(), ("*.py", "data/")])
def test_what_is_said_to_travel_is_what_ray_packs_and_as_large(project, tmp_path_factory, excludes):
    found = travelling(project, excludes)
    package = packed_by_ray(project, tmp_path_factory.mktemp("package") / "x.zip", found.excludes)
    assert sorted(file.name for file in found.files) == sorted(zipfile.ZipFile(package).namelist())
    assert found.package_bytes == package.stat().st_size
    assert set(EXCLUDES) | set(excludes) == set(found.excludes)


def test_results_secrets_and_what_is_ignored_stay_here(project):
    assert [file.name for file in travelling(project).files] == [
        ".gitignore",
        "data/.rayignore",
        "data/small.txt",
        "empty/",
        "größe.txt",
        "learners/ppo.py",
        "recipes/x.yaml",
    ]


def test_what_does_not_fit_is_told_with_the_largest_files():
    files = tuple(PackedFile(f"f{number}", number << 20) for number in range(1, 15))
    directory = WorkingDirectory(Path("/p"), files, ())
    check_fits(directory, directory.package_bytes + 1)
    with pytest.raises(UsageProblem, match=r"^/p has 105\.0 MiB to send, and Ray takes less than 100\.0 MiB") as caught:
        check_fits(directory, upload_limit_bytes())
    assert "The largest: f14 (14.0 MiB), f13 (13.0 MiB)" in str(caught.value)
    with pytest.raises(UsageProblem):  # the limit itself is refused, as aiohttp does
        check_fits(directory, directory.package_bytes)
    assert packed_bytes(()) == 22


def test_a_recipe_that_would_not_travel_is_told(project):
    directory = travelling(project)
    check_has(directory, [project / "recipes" / "x.yaml"])
    with pytest.raises(UsageProblem, match=r"^scratch/x\.txt would be left out of what is sent"):
        check_has(directory, [project / "recipes" / "x.yaml", project / "scratch" / "x.txt"])
    with pytest.raises(UsageProblem, match=r"elsewhere\.yaml is outside .*--working-dir"):
        check_has(directory, [project.parent / "elsewhere.yaml"])
    with pytest.raises(UsageProblem, match=r"There is no directory .*nowhere"):
        travelling(project / "nowhere")
