"""What is not imported, because nothing needs it, in processes that import models."""

import subprocess
import sys

import pytest

IMPORTS = """
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import sys
print(*({"sklearn", "scipy", "pandas"} & set(sys.modules)))
"""


def imported(before: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", before + IMPORTS], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.slow
def test_a_process_that_imports_corpus_has_models_without_scikit_learn_and_scipy():
    assert imported("import corpus") == set()
    assert imported("") >= {"sklearn", "scipy"}  # else there is nothing to keep out any more


@pytest.mark.slow
@pytest.mark.parametrize("first", ["learners.ppo", "actors.scoring", "models.build", "serving.engine"])
def test_every_room_that_has_models_imports_corpus_before_transformers(first):
    assert "sklearn" not in imported(f"import {first}\n")
