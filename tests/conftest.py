"""Which of the fast tests `make check` leaves out, and that none of them starts Ray unasked."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

THOROUGH = frozenset(
    {
        "tests/actors/test_conductor.py",
        "tests/actors/test_conductor_fleet.py",
        "tests/actors/test_fleet.py",
        "tests/actors/test_generator.py",
        "tests/actors/test_http_reward.py",
        "tests/actors/test_network_rewards.py",
        "tests/actors/test_owner.py",
        "tests/actors/test_rewards.py",
        "tests/actors/test_stored_snapshots.py",
        "tests/actors/test_stream.py",
        "tests/amenable/test_canaries.py",
        "tests/amenable/test_command_line.py",
        "tests/amenable/test_gpu_budget.py",
        "tests/amenable/test_interruption.py",
        "tests/amenable/test_jobs.py",
        "tests/amenable/test_manifests.py",
        "tests/amenable/test_permanent_failure.py",
        "tests/amenable/test_plan.py",
        "tests/amenable/test_progress.py",
        "tests/amenable/test_recipe_loading.py",
        "tests/amenable/test_run_lease.py",
        "tests/amenable/test_store_lease.py",
        "tests/amenable/test_stored_run.py",
        "tests/amenable/test_submit.py",
        "tests/amenable/test_top.py",
        "tests/bench/test_workload.py",
        "tests/chaos/test_campaign.py",
        "tests/chaos/test_striking.py",
        "tests/cluster/test_manifest_rules.py",
        "tests/cluster/test_manifests.py",
        "tests/cluster/test_memory.py",
        "tests/cluster/test_monitoring_manifests.py",
        "tests/cluster/test_packing.py",
        "tests/cluster/test_prometheus.py",
        "tests/cluster/test_telemetry.py",
        "tests/corpus/test_agreed_value.py",
        "tests/corpus/test_files.py",
        "tests/corpus/test_hub.py",
        "tests/corpus/test_numbered_objects.py",
        "tests/corpus/test_object_stores.py",
        "tests/corpus/test_stored_directory.py",
        "tests/corpus/test_world.py",
        "tests/evaluation/test_report.py",
        "tests/evaluation/test_results.py",
        "tests/evaluation/test_run_files.py",
        "tests/evaluation/test_win_rate.py",
        "tests/learners/test_engine.py",
        "tests/learners/test_engine_memory.py",
        "tests/learners/test_language_model.py",
        "tests/learners/test_ppo_loop.py",
        "tests/learners/test_ppo_stored.py",
        "tests/learners/test_ppo_update.py",
        "tests/learners/test_reward_model.py",
        "tests/learners/test_stored_checkpoint.py",
        "tests/models/test_scalar_head.py",
        "tests/requirements/test_install.py",
        "tests/serving/test_front.py",
        "tests/serving/test_mirror.py",
        "tests/serving/test_page_scripts.py",
    }
)
"""Modules of fast tests that take more than a second each, but for four that a change is likely to break: nine tenths
of the time of all."""


def pytest_configure(config: pytest.Config) -> None:
    """Among fast tests a call of Ray without a session fails. By itself it starts one, which all later tests then have:
    a thread that outlives its test, and with it the test's stand-in for Ray, would do that now and then."""
    if "not slow" in config.option.markexpr:
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # read when Ray is imported


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them, before `-m` is looked at."""
    gone = sorted(name for name in THOROUGH if not (ROOT / name).exists())
    if gone:
        raise pytest.UsageError(f"tests/conftest.py lists modules that are not there: {', '.join(gone)}.")
    for item in items:
        if item.path.relative_to(ROOT).as_posix() in THOROUGH:
            item.add_marker("thorough")
