"""Which SFT epoch the reward model starts from and comparisons are sampled from."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from amenable.stages.supervised import sft_epoch


def test_it_is_the_one_with_the_lowest_validation_loss_or_the_last():
    exports = [{"directory": f"epoch-{number}", "valid_loss": loss} for number, loss in ((1, 0.9), (2, 0.5), (3, 0.7))]
    context: Any = SimpleNamespace(values=lambda directory: {"exports": exports}, run=SimpleNamespace(sft=Path("sft")))
    assert sft_epoch(context, "best_validation") == "sft/epoch-2"
    assert sft_epoch(context, "last") == "sft/epoch-3"
