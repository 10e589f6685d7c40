"""The networks that PPO trains: how policy and value network are loaded, and how they are exported."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from actors.settings import SamplingSettings
from learners.exports import whole_directory
from models.build import load_causal_lm, set_residual_dropout
from models.export import export_causal_lm
from models.scalar_head import ScalarHeadModel, load_scalar


def load_policy(directory: str) -> PreTrainedModel:
    """The causal language model exported at `directory`, without dropout."""
    model = load_causal_lm(directory)
    set_residual_dropout(model, 0.0)  # dropout is off in PPO (Ziegler and N+ code)
    return model


def load_value(directory: str) -> ScalarHeadModel:
    """The scalar model exported at `directory`, without dropout."""
    model = load_scalar(directory)
    set_residual_dropout(model.backbone, 0.0)
    return model


def export_policy(
    directory: Path, config: Any, weights: dict[str, Tensor], tokenizer: Any, sampling: SamplingSettings
) -> None:
    """Writes `weights` as a causal language model that samples as PPO did. Raises RunProblem where the disk refuses."""
    with whole_directory(directory) as whole:
        export_causal_lm(
            whole, config, weights, tokenizer, sampling.max_response_tokens, temperature=sampling.temperature
        )


def export_value(directory: Path, start: str, weights: dict[str, Tensor], tokenizer: Any) -> None:
    """Writes `weights` of the value network that started from `start`. Raises RunProblem where the disk refuses."""
    with whole_directory(directory) as whole:
        load_value(start).save_value_model(whole, tokenizer, weights)
