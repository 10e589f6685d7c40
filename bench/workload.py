"""The benchmark's workloads: a random 3.7M-parameter model, random data, and a run whose next stage is PPO.

Everything before PPO is fabricated, stage by stage, with the records that the pipeline looks for; so the command line
reuses those stages, and PPO itself is the product's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from amenable.recipe import Recipe
from amenable.run_directory import RunDirectory

VOCABULARY = 2048
PAD, EOS, UNKNOWN = 0, 1, 2
FIRST_WORD = 3
PROMPT_TOKENS = 32
DOCUMENT_TOKENS = 64
"""Length of the pretraining documents: an episode of workload A."""
PROMPTS = 4096
BATCH_SIZE = 128
MINIBATCHES = 8
SHAPE = {"hidden_size": 256, "layers": 4, "heads": 4, "mlp_size": 688, "initial_std": 0.02}
"""Tied embeddings (the default), so that all 3.7M parameters are in matrix products: none of the work counted as useful
is a mere look-up."""

POLICY_LR = 1e-9
"""So small that the lengths of responses, which are the workload, stay what they are; time does not depend on it."""

Name = Literal["A", "B"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Workload:
    """What is generated: responses of at most `max_response_tokens`, which end with this chance at every token.

    The other sizes keep padding small where lengths differ: slots of a chunk, rows that are scored together, and tokens
    of a micro-batch. `turns` says whether all responses end together, so that generator and scoring take turns and
    each has all threads; else they work side by side, on one thread each.
    """

    name: Name
    max_response_tokens: int
    ending_probability: float
    chunk_size: int
    rows_per_batch: int
    tokens_per_microbatch: int
    turns: bool
    says: str


WORKLOADS: dict[Name, Workload] = {
    "A": Workload("A", 32, 0.0, 32, 32, 1024, True, "32 prompt tokens, always 32 response tokens"),
    "B": Workload(
        "B", 128, 1 / 32, 4, 2, 640, False, "32 prompt tokens, up to 128 response tokens, ending early (mean about 32)"
    ),
}


@dataclass(frozen=True)
class Options:
    """How a workload is run. `threads` are the learner's, and the other roles' where they take turns; `updates` include
    the `warm_up` ones, not measured."""

    ptx: bool
    staleness: int
    dtype: Dtype
    threads: int
    updates: int
    warm_up: int


def recipe_for(workload: Workload, options: Options, directory: Path) -> Recipe:
    """The recipe of one run. Its corpus only has to exist: the tables made from it are fabricated."""
    context = PROMPT_TOKENS + workload.max_response_tokens
    beside = options.threads if workload.turns else 1
    return Recipe.model_validate(
        {
            "name": f"bench-{workload.name}",
            "run_directory": directory / "run",
            "corpus": {"path": str(directory / "corpus.jsonl")},
            "tokens": {
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_response_tokens": workload.max_response_tokens,
                "context_tokens": context,
            },
            "model": {"base": str(directory / "model"), "shape": {**SHAPE, "context_length": 256}},
            "sft": {"context_length": context},
            "ppo_init": {"context_length": context},
            "sampling": {"max_response_tokens": workload.max_response_tokens},
            "learners": {
                "threads": options.threads,
                "start_deadline_s": 1800.0,
                "engine": {"dtype": options.dtype, "tokens_per_microbatch": workload.tokens_per_microbatch},
            },
            "rollouts": {"threads": beside, "dtype": options.dtype, "kv_cache_mib": 512},
            "scoring": {"threads": beside, "dtype": options.dtype, "rows_per_batch": workload.rows_per_batch},
            "ppo": {
                "updates": options.updates,
                "batch_size": BATCH_SIZE,
                "minibatches": MINIBATCHES,
                "inner_epochs": 1,
                "chunk_size": workload.chunk_size,
                "max_staleness": options.staleness,
                "policy": {"peak_lr": POLICY_LR, "schedule": "constant", "eps": 1e-5},
                "ptx_coefficient": 27.8 if options.ptx else 0.0,
                "ptx_context": DOCUMENT_TOKENS,
                "evaluate_every": options.updates,
                "evaluation_prompts": 8,
                "checkpoint_every": options.updates,
            },
        }
    )


def fabricate(workload: Workload, recipe: Recipe, directory: Path, seed: int = 0) -> int:
    """Writes corpus, model, tables and the records of all stages before PPO; returns the parameters of the policy."""
    from amenable.pipeline import stages_of
    from amenable.stage_reuse import complete
    from models.build import tiny_llama
    from models.export import export_causal_lm
    from models.scalar_head import ScalarHeadModel

    (directory / "corpus.jsonl").write_text('{"prompt": "w3", "chosen": "w4", "rejected": "w5"}\n')
    tokenizer: Any = _tokenizer()
    model = tiny_llama(recipe.model.shape, VOCABULARY, PAD, None, EOS, seed)
    set_ending_probability(model, workload.ending_probability, seed)
    weights = model.state_dict()

    def export(path: Path) -> Path:
        export_causal_lm(path, model, weights, tokenizer, workload.max_response_tokens)
        return path

    def reward(path: Path) -> Path:
        ScalarHeadModel.from_causal_lm(recipe.model.base or "", seed).save_reward_model(path, tokenizer)
        return path

    export(directory / "model")
    run = RunDirectory(recipe.run_directory)
    makers: dict[str, Callable[[Path], list[Path]]] = {
        "data": lambda path: _data(path, tokenizer, seed),
        "rm": lambda path: [reward(path / "export")],
        "ppo-init": lambda path: [export(path / "export")],
    }
    for stage in stages_of(recipe, run):
        if stage.name == "ppo":
            break
        stage.spec.directory.mkdir(parents=True)
        made = makers[stage.name](stage.spec.directory) if stage.name in makers else []
        complete(stage.spec, made, 0.0, {})
    run.write_recipe(recipe)
    return sum(parameter.numel() for parameter in model.parameters())


def set_ending_probability(model: Any, probability: float, seed: int, sequences: int = 64) -> float:
    """Change a random Llama with tied embeddings so that EOS comes with about `probability` after any token.

    All embeddings get the same large part along one direction, which therefore runs through every hidden state and
    adds the same to every logit; EOS gets a multiple of it, fitted on random sequences. Returns the mean probability
    then found on these (0 asks for one that never comes in practice).
    """
    import torch

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = model.get_input_embeddings().weight
        direction = torch.nn.functional.normalize(torch.randn(embedding.shape[1]), dim=0)
        embedding += 4.0 * direction
        tokens = torch.randint(FIRST_WORD, len(embedding), (sequences, PROMPT_TOKENS))
        hidden = model.model(input_ids=tokens).last_hidden_state.flatten(0, 1)
        own, others = hidden @ embedding[EOS], hidden @ embedding.T
        others[:, EOS] = -torch.inf
        rest, along = others.logsumexp(-1), hidden @ direction
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            found = torch.sigmoid(own + middle * along - rest).mean().item()
            low, high = (low, middle) if found > probability else (middle, high)
        if probability == 0.0:
            low = -3.0  # e^-30 or so
        embedding[EOS] += low * direction
        return torch.sigmoid(own + low * along - rest).mean().item()


def _tokenizer() -> Any:
    """One token a word; PAD, EOS and UNK first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{token}" for token in range(FIRST_WORD, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _data(directory: Path, tokenizer: Any, seed: int) -> list[Path]:
    """The tables that PPO reads: prompts, held-out prompts and pretraining documents, all of random words."""
    from corpus.schemas import make_table, write_table

    generator = np.random.default_rng(seed)

    def words(rows: int, length: int) -> list[list[int]]:
        return generator.integers(FIRST_WORD, VOCABULARY, (rows, length)).tolist()

    def prompts(rows: int) -> dict[str, list]:
        tokens = words(rows, PROMPT_TOKENS)
        names = [f"p{row}" for row in range(rows)]
        texts = [" ".join(f"w{token}" for token in row) for row in tokens]
        return {"prompt_id": names, "user_id": names, "prompt": texts, "prompt_tokens": tokens, "meta": [""] * rows}

    documents = [[*row, EOS] for row in words(PROMPTS, DOCUMENT_TOKENS - 1)]
    tokenizer.save_pretrained(directory / "tokenizer")
    write_table(make_table("prompts", prompts(PROMPTS)), directory / "prompts-ppo.parquet", "prompts")
    write_table(make_table("prompts", prompts(64)), directory / "prompts-heldout.parquet", "prompts")
    write_table(
        make_table("pretraining", {"tokens": documents}), directory / "pretraining-train.parquet", "pretraining"
    )
    names = ("prompts-ppo", "prompts-heldout", "pretraining-train")
    return [directory / "tokenizer", *(directory / f"{name}.parquet" for name in names)]
