"""The command answers fast because its rooms load nothing heavy."""

import importlib.util
import pkgutil
import subprocess
import sys

import pytest

import amenable

HEAVY = {"torch", "ray", "vllm", "transformers", "deepspeed"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(amenable.__path__, "amenable.")
    if module.name != "amenable.__main__"
)


def heavy_modules_after(code: str) -> set[str]:
    code += f"\nimport sys\nprint(*({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_no_module_of_the_command_loads_torch_ray_vllm_or_transformers():
    assert "amenable.cli" in MODULES
    assert heavy_modules_after("\n".join(f"import {name}" for name in MODULES)) == set()


def test_the_check_sees_a_heavy_import():
    assert importlib.util.find_spec("deepspeed")
    assert heavy_modules_after("import types, sys; sys.modules['torch'] = types.ModuleType('torch')") == {"torch"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_loads_nothing_that_reads_recipes_or_tables(arguments):
    code = f"""
import sys
from amenable.cli import app
app({arguments!r}, standalone_mode=False)
print("LOADED", *({{"yaml", "pyarrow", "numpy"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "LOADED"
