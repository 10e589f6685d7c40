"""The shape of a transformer, as far as memory and speed depend on it. Kept apart, so that a plan imports no torch."""

from dataclasses import dataclass
from typing import Any

from corpus.problems import UsageProblem
from models.settings import TinyLlamaSettings


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention. `parameters` counts every weight once, the unembedding among them."""

    parameters: int
    layers: int
    hidden_size: int
    mlp_size: int
    heads: int
    key_value_heads: int
    head_size: int
    vocab_size: int
    tied_embeddings: bool

    @property
    def unembedding_parameters(self) -> int:
        """Weights of the matrix product that makes logits, whether they are the embedding's too or not."""
        return self.vocab_size * self.hidden_size

    @property
    def backbone_matmul_parameters(self) -> int:
        """Weights of the matrix products before the logits. The embedding is a look-up, and none of them."""
        embeddings = self.unembedding_parameters * (1 if self.tied_embeddings else 2)
        return self.parameters - embeddings

    @property
    def scalar_parameters(self) -> int:
        """Weights of the same network with one number a token in place of logits: a reward model, a value network."""
        unembedding = 0 if self.tied_embeddings else self.unembedding_parameters
        return self.parameters - unembedding + self.hidden_size + 1

    def undivided(self, ranks: int) -> str:
        """Why vLLM cannot divide the model over `ranks` devices, as a clause; empty where it can.

        Each device has as many heads as the others and as much of the MLP; key-value heads that are too few are held
        more than once (vLLM's LlamaAttention). Rows of the vocabulary are padded.
        """
        if self.heads % ranks:
            return f"its {self.heads} attention heads do not divide by {ranks}"
        if self.key_value_heads % ranks and ranks % self.key_value_heads:
            return f"its {self.key_value_heads} key-value heads neither divide by {ranks} nor divide it"
        if self.mlp_size % ranks:
            return f"the width of its MLP, {self.mlp_size}, does not divide by {ranks}"
        return ""

    def key_value_bytes(self, element_bytes: int) -> int:
        """Memory of one token's keys and values in all layers."""
        return 2 * self.layers * self.key_value_heads * self.head_size * element_bytes


def llama_shape(settings: TinyLlamaSettings, vocab_size: int) -> ModelShape:
    """The shape of `models.build.tiny_llama`: gated MLP of three matrices, two norms a layer, one at the end."""
    width, mlp = settings.hidden_size, settings.mlp_size
    key_value_heads = settings.key_value_heads or settings.heads
    head = width // settings.heads
    attention = 2 * width * settings.heads * head + 2 * width * key_value_heads * head
    layer = attention + 3 * width * mlp + 2 * width
    embeddings = vocab_size * width * (1 if settings.tied_embeddings else 2)
    return ModelShape(
        parameters=embeddings + settings.layers * layer + width,
        layers=settings.layers,
        hidden_size=width,
        mlp_size=mlp,
        heads=settings.heads,
        key_value_heads=key_value_heads,
        head_size=head,
        vocab_size=vocab_size,
        tied_embeddings=settings.tied_embeddings,
    )


def shape_of_model(directory_or_name: str) -> ModelShape:
    """The shape of a causal language model, from its configuration alone: weights are counted on torch's meta device
    and neither read nor downloaded.

    Raises UsageProblem where the configuration does not load, or not as a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from models.build import LOAD_ERRORS, load_config

    config = load_config(directory_or_name)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except LOAD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageProblem(
            f"Model {directory_or_name!r} cannot be made as a causal language model: {reason}", "model/load"
        ) from None
    text: Any = config.get_text_config()
    unembedding = model.get_output_embeddings()
    heads = text.num_attention_heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        # GPT-2's n_inner may be None, which stands for four times the width there
        mlp_size=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size,
        heads=heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        tied_embeddings=unembedding is not None and unembedding.weight is model.get_input_embeddings().weight,
    )
