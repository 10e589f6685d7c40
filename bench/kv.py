"""`python -m bench.kv`: what it costs to compute keys and values again when weights change, and what it biases to keep
them.

All responses of a batch are half written when new weights are loaded into the generator's engine, in this process. What
the engine then reports of the tokens that follow is compared with what the same network says of them under the new
weights, from the first token on, as a learner computes it.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.rollout_engine import Completion, Request, RolloutEngine
from actors.settings import RolloutSettings
from bench.workload import FIRST_WORD, PROMPT_TOKENS, VOCABULARY, Options, Workload, fabricate, recipe_for

RESPONSE_TOKENS = 128
PUBLISHED_AFTER = 64
"""Engine steps of a batch before new weights are loaded."""
ADAM_STEPS = 8
"""The minibatches of one PPO update."""
RATES = (1e-5, 1e-4, 1e-3)
MODES = ("recompute", "keep")

WORKLOAD = Workload("A", RESPONSE_TOKENS, 0.0, 32, 32, 1024, True, "responses that never end early")
OPTIONS = Options(ptx=False, staleness=1, dtype="float32", threads=1, updates=5, warm_up=2)


@dataclass(frozen=True)
class Cost:
    """Of one publication, in seconds: the load, the step after it, an ordinary step; and tokens computed again."""

    load_s: float
    step_after_s: float
    step_s: float
    recomputed_tokens: int

    @property
    def pause_s(self) -> float:
        """By how much the next token came later than it would have."""
        return self.load_s + self.step_after_s - self.step_s


@dataclass(frozen=True)
class Bias:
    """Of the tokens after a publication: how far the engine's log-probabilities are from those of the new weights, and
    the KL divergence of what the engine drew from to what the new weights say, all in nats."""

    tokens: int
    mean_nats: float
    max_nats: float
    kl_token_nats: float


def bias_of(reported: np.ndarray, exact: np.ndarray) -> Bias:
    """Both [tokens], in nats, of tokens drawn from the distribution that reported them. The KL is Schulman's k3,
    r − 1 − log r with r the ratio of exact to reported probability: unbiased, and never negative.
    """
    log_ratio = exact.astype(np.float64) - reported
    differences = np.abs(log_ratio)
    kl = np.expm1(log_ratio) - log_ratio
    return Bias(len(log_ratio), float(differences.mean()), float(differences.max()), float(kl.mean()))


def stepped(model: Any, learning_rate: float, seed: int) -> Any:
    """A copy of `model` after ADAM_STEPS steps of Adam (PyTorch's moments) on gradients drawn from a normal."""
    import torch

    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(moved.parameters(), lr=learning_rate)
    for _ in range(ADAM_STEPS):
        for parameter in moved.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        adam.step()
    return moved.requires_grad_(False)


def distance(before: Any, after: Any) -> float:
    """‖after − before‖ / ‖before‖ over all weights."""
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    moved = sum(float((new.detach() - old.detach()).square().sum()) for old, new in pairs)
    return (moved / sum(float(old.detach().square().sum()) for old, _ in pairs)) ** 0.5


def requests(count: int, seed: int) -> list[Request]:
    """Prompts of random words, each with a response that is to be drawn."""
    words = np.random.default_rng(seed).integers(FIRST_WORD, VOCABULARY, (count, PROMPT_TOKENS)).tolist()
    return [Request(f"{seed}/{row}", words[row], RESPONSE_TOKENS, 1.0, 1000 * seed + row) for row in range(count)]


def publish_half_way(
    engine: RolloutEngine, batch: Sequence[Request], before: Any, after: Any
) -> tuple[Cost, list[Completion]]:
    """Generates `batch`, under `before` for PUBLISHED_AFTER steps and under `after` from then on."""
    engine.load(before, "0.0")
    for request in batch:
        engine.submit(request)
    ordinary_s = [_step(engine)[0] for _ in range(PUBLISHED_AFTER)]
    cached = engine.cached_tokens
    load_s = engine.load(after, "0.1")
    recomputed = cached - engine.cached_tokens
    after_s, completions = _step(engine)
    while engine.pending:
        completions += _step(engine)[1]
    done = {completion.key: completion for completion in completions}
    cost = Cost(load_s, after_s, float(np.median(ordinary_s[1:])), recomputed)
    return cost, [done[request.key] for request in batch]


def under(model: Any, batch: Sequence[Request], completions: Sequence[Completion]) -> np.ndarray:
    """Log-probabilities in nats by `model` of all response tokens [responses, RESPONSE_TOKENS]; each sequence is read
    anew from its first token on."""
    import torch

    from models.forward import PolicyModel, causal_logprobs
    from models.sequences import sequence_batch

    policy, found = PolicyModel(model), []
    with torch.no_grad():
        for row in range(0, len(batch), 16):
            prompts = [request.prompt_tokens for request in batch[row : row + 16]]
            rows = sequence_batch(prompts, [completion.tokens for completion in completions[row : row + 16]])
            found.append(causal_logprobs(policy, rows.tokens, rows.attention_mask)[0])
    columns = slice(PROMPT_TOKENS - 1, PROMPT_TOKENS + RESPONSE_TOKENS - 1)
    return torch.cat(found)[:, columns].numpy()


@dataclass(frozen=True)
class Step:
    """One size of the step between the weights: how far it goes, relative to their norm, what came of it by mode, and
    how far the new weights are from the old ones on the same tokens."""

    learning_rate: float
    distance: float
    costs: dict[str, list[Cost]]
    biases: dict[str, Bias]
    update: Bias


def measure(engines: dict[str, RolloutEngine], model: Any, rate: float, responses: int, publications: int) -> Step:
    """Publications of weights one step from `model`'s, in the midst of a batch each, by each engine in turn."""
    from models.snapshot import pack

    before = pack(dict(model.named_parameters()), (0, 0))
    costs: dict[str, list[Cost]] = {mode: [] for mode in engines}
    reported: dict[str, list[np.ndarray]] = {mode: [] for mode in engines}
    exact: dict[str, list[np.ndarray]] = {mode: [] for mode in engines}
    old: list[np.ndarray] = []
    moved = 0.0
    for seed in range(publications):
        batch = requests(responses, seed)
        new = stepped(model, rate, seed)
        moved = distance(model, new)
        after = pack(dict(new.named_parameters()), (0, 1))
        for mode, engine in engines.items():
            cost, completions = publish_half_way(engine, batch, before, after)
            costs[mode].append(cost)
            rest = [completion.logprobs[PUBLISHED_AFTER:] for completion in completions]
            reported[mode].append(np.concatenate(rest))
            exact[mode].append(under(new, batch, completions)[:, PUBLISHED_AFTER:].reshape(-1))
            if mode == "recompute":
                old.append(under(model, batch, completions)[:, PUBLISHED_AFTER:].reshape(-1))
    biases = {mode: bias_of(np.concatenate(reported[mode]), np.concatenate(exact[mode])) for mode in engines}
    update = bias_of(np.concatenate(exact["recompute"]), np.concatenate(old))
    return Step(rate, moved, costs, biases, update)


def table(steps: Sequence[Step]) -> list[str]:
    """The lines that are printed: costs, as medians over all publications, and a row of biases for each step."""
    lines = [f"{'':34}" + "".join(f"{mode:>12}" for mode in MODES)]
    costs = {mode: [cost for step in steps for cost in step.costs[mode]] for mode in MODES}
    for name, says in (
        ("load_s", "load, s"),
        ("step_after_s", "the step after it, s"),
        ("step_s", "a step otherwise, s"),
        ("pause_s", "so the next tokens were late by, s"),
    ):
        lines.append(f"{says:34}" + "".join(f"{_median(costs[mode], name):12.4f}" for mode in MODES))
    lines.append(
        f"{'tokens computed again':34}" + "".join(f"{_median(costs[m], 'recomputed_tokens'):12.0f}" for m in MODES)
    )
    lines.append("")
    lines.append(
        "Tokens after the publication, nats: |engine - new weights| mean and max a token, KL a token and a response"
    )
    for step in steps:
        lines.append(
            f"Adam, {ADAM_STEPS} steps of lr {step.learning_rate:g}: weights moved by {step.distance:.3g} of their norm"
        )
        for name, bias in [*step.biases.items(), ("old weights instead of new", step.update)]:
            kl = bias.kl_token_nats
            lines.append(
                f"  {name:28}{bias.mean_nats:12.3g}{bias.max_nats:12.3g}{kl:12.3g}"
                f"{kl * (RESPONSE_TOKENS - PUBLISHED_AFTER):12.3g}"
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.kv", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("--responses", type=int, default=128, help="written side by side")
    parser.add_argument("--publications", type=int, default=3, help="for each size of the step between the weights")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    asked = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="amenable-bench-") as temporary:
        directory = Path(temporary)
        parameters = fabricate(WORKLOAD, recipe_for(WORKLOAD, OPTIONS, directory), directory)
        from models.build import load_causal_lm

        model = load_causal_lm(str(directory / "model")).eval()
        context = PROMPT_TOKENS + RESPONSE_TOKENS
        engines = {}
        for mode in MODES:
            settings = RolloutSettings.model_validate(
                {
                    "threads": asked.threads,
                    "max_concurrent": asked.responses,
                    "kv_cache_mib": 512,
                    "kv_on_publish": mode,
                }
            )
            engines[mode] = RolloutEngine(str(directory / "model"), settings, context)
        for engine in engines.values():  # the first steps allocate
            engine.run(requests(min(8, asked.responses), seed=10_000))
        steps = [measure(engines, model, rate, asked.responses, asked.publications) for rate in RATES]
    print(
        f"{parameters:,} parameters, float32; {asked.responses} responses of {RESPONSE_TOKENS} tokens after prompts of "
        f"{PROMPT_TOKENS}, new weights after {PUBLISHED_AFTER} steps, {asked.publications} times each; "
        f"{asked.threads} threads, {len(os.sched_getaffinity(0))} cores, load {load_before:.1f} before"
    )
    print("\n".join(table(steps)))
    return 0


def _median(costs: Sequence[Cost], name: str) -> float:
    return float(np.median([getattr(cost, name) for cost in costs]))


def _step(engine: RolloutEngine) -> tuple[float, list[Completion]]:
    started = time.perf_counter()
    completions = engine.step()
    return time.perf_counter() - started, completions


if __name__ == "__main__":
    sys.exit(main())
