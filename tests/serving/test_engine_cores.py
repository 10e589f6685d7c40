"""Whether an engine without a GPU is one process or two is a matter of cores, or of the recipe."""

import joblib
import pytest

from serving.engine import is_one_process
from serving.settings import ServingSettings


@pytest.mark.parametrize(
    ("cores", "given", "apart"),
    [
        (2, {"memory_budget_gib": 2.5}, False),  # one engine, and no core for what stands before it
        (3, {"memory_budget_gib": 2.5}, True),
        (2, {}, False),  # two engines
        (4, {}, False),
        (5, {}, True),
        (4, {"max_replicas": 2}, False),
        (4, {"threads": 2}, False),
        (6, {"threads": 2}, False),
        (7, {"threads": 2}, True),
        (1, {"worker_apart": True}, True),
        (64, {"worker_apart": False}, False),
        (1, {"gpus": 1, "worker_apart": False}, True),  # a matter of vLLM's
    ],
)
def test_an_engine_has_a_process_more_where_loops_and_workers_of_all_engines_have_cores(
    cores, given, apart, monkeypatch
):
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    assert is_one_process(ServingSettings(**given)) is not apart
