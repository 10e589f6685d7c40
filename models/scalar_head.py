"""A network with one number a token: the reward model's score and the value network's value."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from corpus.problems import UsageProblem
from models.build import load_pretrained
from models.export import write_model
from models.forward import call_arguments
from models.packing import use_packed_attention


class ScalarHeadModel(nn.Module):
    """A language model's backbone with a linear head of one output.

    Parameters are named `backbone.…` (as in AutoModel), `head.weight` and `head.bias`.
    """

    def __init__(self, backbone: PreTrainedModel, seed: int = 0):
        """The head's weights are drawn with std 1/√(d + 1), its bias is 0 (inherited from Ziegler's code)."""
        super().__init__()
        self.backbone = backbone
        width = backbone.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, bias=True, dtype=backbone.dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(1, width, generator=generator) * (width + 1) ** -0.5)
            self.head.bias.zero_()

    @classmethod
    def from_causal_lm(cls, directory: str, seed: int, dtype: torch.dtype = torch.float32) -> Self:
        """The backbone of a causal language model, its unembedding replaced by a new head (InstructGPT, section 3.5).

        Raises UsageProblem where the directory does not load.
        """
        return cls(load_pretrained(AutoModel, directory, dtype), seed)

    @classmethod
    def from_scalar(cls, directory: str, dtype: torch.dtype = torch.float32) -> Self:
        """A saved reward or value model, head and bias with it.

        Any sequence or token classifier with one label loads, this project's or not; a bias that its class
        lacks is read from "reward_bias" in config.json, 0 where that is absent. Raises UsageProblem otherwise.
        """
        auto_class = _classifier_class(directory)
        classifier = load_pretrained(auto_class, directory, dtype)
        if classifier.config.num_labels != 1:
            raise UsageProblem(
                f"Model {directory!r} gives {classifier.config.num_labels} numbers; a reward is one.", "reward/labels"
            )
        backbone = getattr(classifier, classifier.base_model_prefix)
        weight_name, bias_name = head_names(classifier)
        weights = classifier.state_dict()
        model = cls(backbone)
        with torch.no_grad():
            model.head.weight.copy_(weights[weight_name])
            if bias_name is not None:
                model.head.bias.copy_(weights[bias_name])
            else:
                model.head.bias.fill_(float(getattr(classifier.config, "reward_bias", 0.0)))
        return model

    @property
    def config(self) -> PreTrainedConfig:
        """The Hugging Face configuration of the backbone."""
        return self.backbone.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in backward; takes effect in training mode only."""
        self.backbone.gradient_checkpointing_enable(**kwargs)

    def pack_rows(self) -> bool:
        """Leave padding out from now on, where the network's type allows it (models.packing); whether it does."""
        return use_packed_attention(self.backbone)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch time"]:
        """One float32 number for every token, 0 at pads, from what the network has read up to and with that token."""
        arguments, places = call_arguments(self.backbone, tokens, attention_mask)
        output = self.backbone(use_cache=False, **arguments)
        values = self.head(output.last_hidden_state).float().flatten()
        return values[places].masked_fill(~attention_mask.bool(), 0.0)

    def save_reward_model(
        self,
        directory: Path,
        tokenizer: PreTrainedTokenizerFast,
        bias: float = 0.0,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a sequence classifier with one label, which scores a sequence at its last real token.

        `bias` is added to the head's own (minus the mean score of demonstrations: InstructGPT, section 3.5, has
        them score 0). The class has no bias, so the total is "reward_bias" in config.json: readers add it to
        the class's output. `weights` are by this module's parameter names, its own where None.
        """
        weights = dict(self.state_dict() if weights is None else weights)
        total = float(weights.pop("head.bias").item()) + bias
        self._save(directory, tokenizer, AutoModelForSequenceClassification, weights, {"reward_bias": total})

    def save_value_model(
        self, directory: Path, tokenizer: PreTrainedTokenizerFast, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a token classifier with one label, bias included: its logits are the values.

        Where Transformers has no token classifier for the architecture it is a sequence classifier, as a reward model
        is. `weights` are by this module's parameter names, its own where None.
        """
        if type(self.config) not in AutoModelForTokenClassification._model_mapping:
            self.save_reward_model(directory, tokenizer, weights=weights)
            return
        weights = dict(self.state_dict() if weights is None else weights)
        self._save(directory, tokenizer, AutoModelForTokenClassification, weights, {"classifier_dropout": 0.0})

    def _save(
        self,
        directory: Path,
        tokenizer: PreTrainedTokenizerFast,
        auto_class: Any,
        weights: Mapping[str, Tensor],
        extra: Mapping[str, float],
    ) -> None:
        config = type(self.config).from_dict(self.config.to_dict())
        config.num_labels = 1
        config.pad_token_id = tokenizer.pad_token_id  # where sequence classifiers find the last real token
        for name, value in extra.items():
            setattr(config, name, value)
        try:
            with torch.device("meta"):
                skeleton = auto_class.from_config(config)
        except ValueError as error:
            raise UsageProblem(
                f"{type(self.backbone).__name__} cannot be saved as a scalar model: {error}", "model/kind"
            ) from error
        weight_name, bias_name = head_names(skeleton)
        names = {"head.weight": weight_name, "head.bias": bias_name}
        prefix = skeleton.base_model_prefix
        state = {
            names.get(name) or f"{prefix}.{name.removeprefix('backbone.')}": tensor for name, tensor in weights.items()
        }
        write_model(directory, auto_class, config, state, torch.float32)
        tokenizer.save_pretrained(directory)


def load_scalar(directory: str, dtype: torch.dtype = torch.float32) -> ScalarHeadModel:
    """A saved reward model or value model; see `ScalarHeadModel.from_scalar`."""
    return ScalarHeadModel.from_scalar(directory, dtype)


def last_token_scores(
    values: Float[Tensor, "batch time"], attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"]
) -> Float[Tensor, " batch"]:
    """The number at each row's last real token, which is EOS itself where the response kept one (Stiennon; N+ code)."""
    places = torch.arange(values.shape[1], device=values.device)
    last = (attention_mask.bool() * places).argmax(-1, keepdim=True)
    return values.gather(-1, last).squeeze(-1)


def head_names(classifier: PreTrainedModel) -> tuple[str, str | None]:
    """The names of a one-label classifier's head weight and head bias (None where it has none)."""
    prefix = classifier.base_model_prefix + "."
    own = [name for name in classifier.state_dict() if not name.startswith(prefix)]
    weights = [name for name in own if name.endswith(".weight")]
    biases = [name for name in own if name.endswith(".bias")]
    if len(weights) != 1 or len(own) != len(weights) + len(biases) or len(biases) > 1:
        raise UsageProblem(f"{type(classifier).__name__} has no plain linear head ({', '.join(own)}).", "model/kind")
    return weights[0], (biases or [None])[0]


def _classifier_class(directory: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageProblem(f"Model {directory!r} does not load: {str(error).splitlines()[0]}", "model/load") from error
    architecture = (config.architectures or ["no architecture"])[0]
    if architecture.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if architecture.endswith("ForTokenClassification"):
        return AutoModelForTokenClassification
    raise UsageProblem(f"Model {directory!r} is a {architecture}, not a sequence or token classifier.", "model/kind")
