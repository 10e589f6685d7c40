"""What held-out prompts are, and what their samples come to."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts that the conductor samples during PPO, and who judges them beside the reward model."""

    prompts: pa.Table
    samples: int
    seed: int
    judge: Any = None
    """A function (meta of the prompt as JSON, response) -> gold score, or None."""


def held_out_means(
    held_out: HeldOut, samples: pa.Table, rewards: list[float], reference_logprobs: list[list[float]]
) -> dict[str, float | None]:
    """Means over samples: reward, gold (None without a judge), length in tokens, eos_rate, and kl, the summed log-ratio
    to the reference in nats a sequence."""
    kl = [sum(own) - sum(its) for own, its in zip(samples["logprobs"].to_pylist(), reference_logprobs, strict=True)]
    gold = None
    if held_out.judge is not None:
        asked = held_out.prompts.select(["prompt_id", "meta"]).to_pylist()
        meta = {row["prompt_id"]: row["meta"] for row in asked}
        pairs = zip(samples["prompt_id"].to_pylist(), samples["response"].to_pylist(), strict=True)
        gold = float(np.mean([held_out.judge(meta[prompt], response) for prompt, response in pairs]))
    return {
        "reward": float(np.mean(rewards)),
        "gold": gold,
        "kl": float(np.mean(kl)),
        "length": float(np.mean([len(response) for response in samples["response_tokens"].to_pylist()])),
        "eos_rate": float(np.mean([reason == "stop" for reason in samples["finish_reason"].to_pylist()])),
    }
