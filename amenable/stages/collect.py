"""The collect stage: K responses of the SFT model to each prompt, ranked by the world's simulated labelers."""

import json
from random import Random

import pyarrow as pa

from amenable.stage_reuse import StageSpec
from amenable.stages.context import Context, Finished
from amenable.stages.data import check_tables, validates
from amenable.stages.sampling import load_into_generators, sample
from amenable.stages.supervised import sft_epoch
from corpus.world import Labeler, build_world


def run(context: Context, spec: StageSpec) -> Finished:
    """Writes comparisons-train and comparisons-valid (training labelers) and comparisons-heldout-labelers."""
    from corpus.schemas import read_table, write_table

    recipe = context.recipe
    load_into_generators(context, sft_epoch(context, recipe.collect.sampled_epoch), "sft")
    prompts = read_table(str(context.data("prompts-collect")), "prompts")
    rng = Random(f"{recipe.seed}/collect")
    sizes = [rng.randint(recipe.collect.min_responses, recipe.collect.max_responses) for _ in range(prompts.num_rows)]
    total, done = sum(sizes), 0
    responses: dict[str, list[tuple[str, list[int]]]] = {}
    for size in sorted(set(sizes)):
        mine = prompts.filter(pa.array([each == size for each in sizes]))
        samples = sample(context, mine, size, recipe.seed + 3, spec.directory, f"{size}-each", done, total)
        done += samples.num_rows
        for prompt_id, text, tokens in zip(
            samples["prompt_id"].to_pylist(),
            samples["response"].to_pylist(),
            samples["response_tokens"].to_pylist(),
            strict=True,
        ):
            responses.setdefault(prompt_id, []).append((text, tokens))
    world = build_world(recipe.world)
    users = prompts["user_id"].to_pylist()
    held_out = [validates(recipe, user) for user in users]
    valid = pa.array(held_out)
    train = pa.array([not each for each in held_out])
    tables = {
        "comparisons-train": _ranked(prompts.filter(train), responses, world.labelers, recipe.seed),
        "comparisons-valid": _ranked(prompts.filter(valid), responses, world.labelers, recipe.seed),
    }
    if world.heldout_labelers:
        ranked = _ranked(prompts.filter(valid), responses, world.heldout_labelers, recipe.seed)
        tables["comparisons-heldout-labelers"] = ranked
    check_tables(tables)
    context.check_lease()
    files = []
    for name, table in tables.items():
        files.append(spec.directory / f"{name}.parquet")
        write_table(table, files[-1], "comparisons")
    return Finished(files, {"responses": total, **{name: table.num_rows for name, table in tables.items()}})


def _ranked(
    prompts: pa.Table, responses: dict[str, list[tuple[str, list[int]]]], labelers: list[Labeler], seed: int
) -> pa.Table:
    """One row a prompt, ranked by one labeler, drawn by the seed."""
    from corpus.schemas import make_table

    rows = prompts.to_pylist()
    rng = Random(f"{seed}/labelers/{labelers[0].labeler_id}")
    chosen = [rng.choice(labelers) for _ in rows]
    texts = [[text for text, _ in responses[row["prompt_id"]]] for row in rows]
    ranks = [
        labeler.rank(json.loads(row["meta"]), each, rng.randrange(2**31))
        for labeler, row, each in zip(chosen, rows, texts, strict=True)
    ]
    return make_table(
        "comparisons",
        {
            "prompt_id": [row["prompt_id"] for row in rows],
            "user_id": [row["user_id"] for row in rows],
            "labeler_id": [labeler.labeler_id for labeler in chosen],
            "prompt": [row["prompt"] for row in rows],
            "prompt_tokens": [row["prompt_tokens"] for row in rows],
            "responses": texts,
            "response_tokens": [[tokens for _, tokens in responses[row["prompt_id"]]] for row in rows],
            "ranks": ranks,
            "meta": [row["meta"] for row in rows],
        },
    )
