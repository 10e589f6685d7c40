"""The moving average of the policy's weights, in float32: at a decay of 0.992 it would stall in bfloat16."""

from collections.abc import Mapping

from torch import Tensor


class WeightAverage:
    """decay · average + (1 − decay) · weights, by parameter name (InstructGPT, appendix C.4: decay 0.992)."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self._decay = decay
        self.weights = {name: tensor.float().clone() for name, tensor in weights.items()}

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the present weights."""
        for name, tensor in weights.items():
            self.weights[name].lerp_(tensor.float(), 1.0 - self._decay)
