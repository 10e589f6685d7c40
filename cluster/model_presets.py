"""Shapes of well-known models by name (model_presets.yaml), to plan with before there is a checkpoint."""

from importlib import resources

from pydantic import BaseModel, ConfigDict, Field

from models.shape import ModelShape

TABLE = "model_presets.yaml"


class ModelPreset(BaseModel):
    """What a preset says of a decoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    key_value_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    mlp_size: int = Field(gt=0)
    gated: bool
    vocab_size: int = Field(gt=0)
    tied_embeddings: bool

    def shape(self) -> ModelShape:
        """The shape, its weights counted without biases, positions and (a ten-thousandth of them) norms' shifts."""
        width = self.hidden_size
        attention = 2 * width * (self.heads + self.key_value_heads) * self.head_size
        layer = attention + (3 if self.gated else 2) * width * self.mlp_size + 2 * width
        embeddings = self.vocab_size * width * (1 if self.tied_embeddings else 2)
        return ModelShape(
            parameters=embeddings + self.layers * layer + width,
            layers=self.layers,
            hidden_size=width,
            mlp_size=self.mlp_size,
            heads=self.heads,
            key_value_heads=self.key_value_heads,
            head_size=self.head_size,
            vocab_size=self.vocab_size,
            tied_embeddings=self.tied_embeddings,
        )


def model_presets() -> dict[str, ModelShape]:
    """The shapes of the table by name."""
    import yaml

    table = resources.files("cluster").joinpath(TABLE).read_text(encoding="utf-8")
    return {name: ModelPreset(**entry).shape() for name, entry in yaml.safe_load(table).items()}
