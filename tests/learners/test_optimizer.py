import pytest
from pydantic import ValidationError

from learners.optimizer import OptimizerSettings


def test_cosine_goes_from_the_peak_to_a_tenth_of_it():
    settings = OptimizerSettings(peak_lr=2.0)
    rates = [settings.learning_rate(step, 100) for step in range(101)]
    assert rates[0] == 2.0
    assert rates[50] == pytest.approx(1.1)
    assert rates[100] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)


def test_ppo_warms_up_from_a_tenth_of_the_peak_in_ten_iterations_and_stays_there():
    settings = OptimizerSettings(peak_lr=1.0, schedule="constant", warmup_steps=10)
    rates = [settings.learning_rate(step, 500) for step in range(500)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert set(rates[10:]) == {1.0}


def test_cosine_after_warm_up_starts_at_the_peak():
    settings = OptimizerSettings(peak_lr=1.0, warmup_steps=50, warmup_start_fraction=0.0)
    assert settings.learning_rate(0, 100) == 0.0
    assert settings.learning_rate(50, 100) == 1.0
    assert settings.learning_rate(1000, 100) == pytest.approx(0.1)


def test_a_misspelt_key_and_a_negative_rate_are_refused():
    with pytest.raises(ValidationError):
        OptimizerSettings(peak_lr=1.0, warm_up=3)
    with pytest.raises(ValidationError):
        OptimizerSettings(peak_lr=-1.0)
