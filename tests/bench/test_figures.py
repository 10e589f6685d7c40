import json

import pytest

from bench import ceiling
from bench.figures import Work, measured, rows, useful_fraction

WORK = Work(parameters=3_700_000, episodes=128, prompt_tokens=32, pretraining_tokens=512)


def lines(seconds: list[float], idle: float = 0.5) -> list[dict[str, float]]:
    """Metrics of updates that took so many seconds each, from Unix time 1000 on."""
    found, now = [], 1000.0
    for step, each in enumerate(seconds):
        now += each
        line = {
            "step": step + 1,
            "time": now,
            "response/length_mean": 32.0,
            "time/wait_for_episodes": idle * each,
            "time/publish": 0.2,
            "sync/publish_seconds": 0.1,
            "sync/pause_seconds": 0.05,
            "mismatch/max_abs_log_ratio": 1e-5,
            "memory/learner_bytes": (step + 1) * 2.0**30,
            "memory/generators_bytes": 2.0**30,
            "memory/scoring_bytes": 2.0**29,
        }
        if step > 1:
            line |= {f"{role}/busy_share": 0.25 for role in ("generators", "scoring")}
            line |= {f"{role}/cores": 0.5 for role in ("generators", "scoring")}
            line |= {f"{role}/tokens_per_second": 100.0 for role in ("generators", "scoring")}
        found.append(line)
    return found


def test_only_updates_between_warm_up_and_the_last_are_measured():
    figures = measured(lines([60, 30, 4, 4, 8, 90]), WORK, warm_up=2, started_at=990.0)
    assert figures.updates == 3
    assert figures.episodes_per_s == pytest.approx(3 * 128 / 16)
    assert figures.first_update_s == 70
    assert figures.learner_gib == 6  # but memory is the highest of all


def test_shares_are_of_wall_clock_time():
    figures = measured(lines([60, 30, 4, 4, 90]), WORK, warm_up=2, started_at=0)
    assert figures.learner_waits_for_episodes == pytest.approx(0.5)
    assert figures.learner_idle == pytest.approx(0.5 + 2 * 0.1 / 8)
    assert figures.generator_idle == figures.scoring_idle == 0.75
    assert figures.generator_tokens_per_busy_s == pytest.approx(400)


def test_a_run_that_is_all_warm_up_is_refused():
    with pytest.raises(ValueError, match="too few"):
        measured(lines([60, 30, 4, 90]), WORK, warm_up=2, started_at=0)
    with pytest.raises(ValueError, match="too few"):
        measured(lines([60, 30, 4, 4, 90]), WORK, warm_up=1, started_at=0)


def test_useful_work_of_the_reference_speed_is_its_published_share_of_the_ceiling():
    """TRL's PPO trainer: 19.3 episodes/s of 32 + 32 tokens with 3.7M parameters were about 15 % of 600 GFLOP/s."""
    figures = measured(lines([60, 30, 128 / 19.3, 128 / 19.3, 90]), WORK, warm_up=2, started_at=0)
    assert useful_fraction(figures, 600e9) == pytest.approx(0.152, abs=0.001)


def test_pretraining_text_is_counted_apart():
    figures = measured(lines([60, 30, 4, 4, 90]), WORK, warm_up=2, started_at=0)
    assert figures.gflops_with_pretraining / figures.gflops == pytest.approx(1 + 512 * 3 / (64 * 10))
    told = dict(rows(figures, {"bfloat16": 600e9, "float32": 150e9}, ptx=True))
    gflops = [figures.gflops_with_pretraining, figures.gflops]
    for name, total in zip(("with pretraining text", "useful work"), gflops, strict=True):
        assert f"{total / 600:.3f}" in told[name]
        assert f"{total / 150:.3f}" in told[name]
    assert "with pretraining text" not in dict(rows(figures, {"bfloat16": 600e9}, ptx=False))


def test_figures_are_plain_json():
    from dataclasses import asdict

    figures = measured(lines([60, 30, 4, 4, 90]), WORK, warm_up=2, started_at=0)
    assert json.loads(json.dumps(asdict(figures), allow_nan=False)) == asdict(figures)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_ceiling_is_that_of_the_largest_product_in_time(dtype, monkeypatch):
    """A machine of 1 GFLOP/s gets through 512 × 512 in 0.3 s, but not through 1024 × 1024; a fast one has all."""
    asked = []

    def product(flops: float):
        def fastest(size: int, kind: str, seconds: float) -> float:
            asked.append((size, kind))
            return 2 * size**3 / flops

        return fastest

    monkeypatch.setattr(ceiling, "_fastest_product", product(1e9))
    assert ceiling.matrix_product_flops(dtype, seconds=1.0) == pytest.approx(1e9)
    assert max(asked) == (512, dtype)
    monkeypatch.setattr(ceiling, "_fastest_product", product(1e12))
    assert ceiling.matrix_product_flops(dtype, seconds=1.0) == pytest.approx(1e12)
    assert max(asked) == (2048, dtype)
