"""The data stage: the corpus, tokenised once into the tables that every later stage reads."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from amenable.recipe import Recipe
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import StageSpec, read_record
from amenable.stages.context import Context, Finished
from amenable.stages.sources import PADDED_BASE, model_hashes, whereabouts
from corpus.files import FileCorpusSettings, Source
from corpus.problems import UsageProblem
from corpus.tokenising import TokenLimits

HUB_CARDS = "hub"
"""Among the stage's values: what the Hub told of the data sets that were read from it."""

BASE_FILES = "base_files"
"""What the stage reads of a base model that is given."""

BUILT_IN = "built-in world"

LICENCE_OF_BUILT_IN = "Apache-2.0"
"""Of the program, which makes its texts from its own words."""

NOT_STATED = "not stated"

_LICENCES: Any = {"licence": True} | {
    part: {"licence"} for part in ("pretraining", "demonstrations", "prompts", "comparisons")
}
"""What does not change the tables, and therefore does not make the stage run again."""


def reads(recipe: Recipe, sources: dict[str, str] | None = None) -> dict[str, Any]:
    """What the stage depends on: the world's settings, or the files' settings and contents.

    `sources` are `source_hashes(recipe)`, where the caller has them already.
    """
    found: dict[str, Any] = {"tokens": recipe.tokens.model_dump(mode="json"), "seed": recipe.seed}
    if recipe.corpus is None:
        found["world"] = recipe.world.model_dump(mode="json")
        found["collect.held_out_fraction"] = recipe.collect.held_out_fraction
    else:
        found["corpus"] = recipe.corpus.model_dump(mode="json", exclude=_LICENCES)
        found["sources"] = source_hashes(recipe) if sources is None else sources
    if recipe.model.base is None:
        found["vocab_size"] = recipe.model.vocab_size if recipe.corpus is not None else None
    else:
        found["base"] = recipe.model.base
        found[BASE_FILES] = model_hashes(recipe.model.base)
    return found


def source_hashes(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of every file the corpus is read from; of a Hub dataset the commit, "commit 1234abc…".

    By the address that the recipe gives, or, where that stands for several files, by their own. A commit that the Hub
    does not tell is taken to be the one that this run has read before, so that a Hub that is away changes nothing; it
    is "commit not told" where there is none. Raises UsageProblem where a file is not there or cannot be read.
    """
    from corpus.hub import HUB, hub_card, name_and_split
    from corpus.readers import find_files
    from corpus.storage import named, one_line

    hashes: dict[str, str] = {}
    for address in addresses(recipe):
        if address.startswith(HUB):
            commit = hub_card(name_and_split(address)[0]).commit
            hashes[address] = _read_before(recipe, address) if commit is None else f"commit {commit}"
            continue
        filesystem, files = find_files(address)
        for file in files:
            name = named(address, file)
            try:
                hashes[address if len(files) == 1 else name] = _sha256(filesystem, file)
            except OSError as error:
                raise UsageProblem(f"{name}: cannot be read ({one_line(error)}).", "data/unreadable") from error
    return hashes


def _read_before(recipe: Recipe, address: str) -> str:
    record = read_record(RunDirectory(recipe.run_directory).data)
    return str((record.reads if record is not None else {}).get("sources", {}).get(address, "commit not told"))


def _sha256(filesystem: Any, file: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open_input_stream(file, compression=None) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def addresses(recipe: Recipe) -> list[str]:
    """Every place that the corpus is read from, as the recipe gives it."""
    corpus = recipe.corpus
    if corpus is None:
        return []
    named = [corpus.path, *(source.path for source in _sources(corpus))]
    return list(dict.fromkeys(address for address in named if address))


def _sources(corpus: FileCorpusSettings) -> list[Source]:
    parts = (corpus.pretraining, corpus.demonstrations, corpus.prompts, corpus.comparisons)
    return [source for source in parts if source is not None]


def data_sets(recipe: Recipe, cards: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """What the lineage says of each data set, by its address: `licence`, NOT_STATED where nobody states one;
    `licence_from`, who does ("recipe", "Hugging Face Hub", "amenable" for the built-in world), left out where nobody
    does; `commit` of a data set of the Hub.

    `cards` is what the Hub has told, by address, as the data stage keeps it in its values under HUB_CARDS.
    """
    if recipe.corpus is None:
        return {BUILT_IN: {"licence": LICENCE_OF_BUILT_IN, "licence_from": "amenable"}}
    corpus = recipe.corpus
    by_recipe = {source.path: source.licence for source in _sources(corpus) if source.licence}
    if corpus.path and corpus.licence:
        by_recipe[corpus.path] = corpus.licence
    found: dict[str, dict[str, str]] = {}
    for address in addresses(recipe):
        card = cards.get(address, {})
        if address in by_recipe:
            says = {"licence": by_recipe[address], "licence_from": "recipe"}
        elif card.get("licence"):
            says = {"licence": str(card["licence"]), "licence_from": "Hugging Face Hub"}
        else:
            says = {"licence": NOT_STATED}
        found[address] = says | ({"commit": str(card["commit"])} if card.get("commit") else {})
    return found


def _hub_cards(context: Context) -> dict[str, dict[str, str | None]]:
    """What the Hub tells of the data sets that come from it, by address; a note for each of which it tells nothing."""
    from corpus.hub import HUB, hub_card, name_and_split

    found = {}
    for address in addresses(context.recipe):
        if address.startswith(HUB):
            card = hub_card(name_and_split(address)[0])
            if card.why:
                context.progress.note(f"data: the Hub tells neither commit nor licence of {address} ({card.why}).")
            found[address] = {"commit": card.commit, "licence": card.licence}
    return found


def validates(recipe: Recipe, user_id: str) -> bool:
    """Whether the rankings of this user of the built-in world validate the reward model, and train none."""
    from corpus.splits import is_held_out

    return is_held_out(user_id, recipe.collect.held_out_fraction, recipe.seed)


def table_name(name: str) -> Any:
    """The schema of a table by the name of its file: 'prompts-ppo' is a prompts table."""
    return name.partition("-")[0]


def run(context: Context, spec: StageSpec) -> Finished:
    """Writes tokenizer/ and the tables; returns their sizes, and how many rows were left out or cut, and why."""
    from corpus.schemas import write_table

    recipe, directory = context.recipe, spec.directory
    tokenizer_directory = directory / "tokenizer"
    context.progress.update(0, None, "tables")
    if recipe.corpus is None:
        context.crew.learners()  # their imports run beside this
        tables, left_out = _world_tables(recipe, tokenizer_directory), {}
    else:
        tables, left_out = _file_tables(recipe, tokenizer_directory)
    check_tables(tables)
    context.crew.learners()  # only now: rows of a person's own may be wrong, and learners that start must be waited for
    for sentence in told(tables, recipe.tokens):
        context.progress.note(f"data: {sentence}")
    if left_out:
        counted = ", ".join(f"{count:,} of {part}" for part, count in left_out.items())
        context.progress.note(f"data: rows left out of training, because their prompt is held out: {counted}.")
    files: list[Path] = [tokenizer_directory]
    sizes = {}
    for name, table in tables.items():
        context.check_lease()
        write_table(table, directory / f"{name}.parquet", table_name(name))
        files.append(directory / f"{name}.parquet")
        sizes[name] = table.num_rows
        context.progress.update(len(sizes), len(tables), "tables")
    if recipe.model.base is not None:
        from models.export import write_with_row_for_pad

        padded = directory / PADDED_BASE
        context.check_lease()
        if write_with_row_for_pad(whereabouts(recipe.model.base), str(tokenizer_directory), padded):
            files.append(padded)
    values = sizes | filtered(tables) | {f"{part}-left-out": count for part, count in left_out.items()}
    cards = _hub_cards(context)
    return Finished(files, values | ({HUB_CARDS: cards} if cards else {}))


def filtered(tables: Mapping[str, Any]) -> dict[str, int]:
    """How many rows the limits of length left out, cut or split, where any: `comparisons-train-long-prompts` and so
    on, by table and by what `corpus.tokenising.counts` calls it."""
    from corpus.tokenising import counts

    return {
        f"{name}-{what.replace('_', '-')}": count
        for name, table in tables.items()
        for what, count in counts(table).items()
        if count
    }


def told(tables: Mapping[str, Any], limits: TokenLimits) -> list[str]:
    """What a person should know of rows that training and evaluation do not see whole: one sentence a kind."""
    from corpus.tokenising import counts

    prompts = f"prompts of more than {limits.max_prompt_tokens:,} tokens (tokens.max_prompt_tokens)"
    responses = f"responses of more than {limits.max_response_tokens:,} tokens (tokens.max_response_tokens)"
    kinds = {
        "long_prompts": f"rows left out because of {prompts}",
        "long_responses": f"rows left out because of {responses}",
        "cut_responses": f"{responses} that were cut",
        "empty_documents": "documents left out because they are empty",
    }
    found = []
    for kind, what in kinds.items():
        of = {name: counts(table).get(kind, 0) for name, table in tables.items()}
        counted = ", ".join(f"{count:,} of {name}" for name, count in of.items() if count)
        if counted:
            found.append(f"{what}: {counted}.")
    return found


def file_comparisons(place: str, tokenizer_directory: str, limits: TokenLimits) -> Any:
    """The comparisons table of a file that is no part of the run's corpus; `counts` says what the limits took from it.

    Raises UsageProblem where it holds no comparisons, none within the limits, or none that are ranked apart.
    """
    from corpus.formats import read_source
    from corpus.schemas import untied_pairs
    from corpus.tokenising import tokenise_comparisons
    from models.build import load_tokenizer

    rows = read_source(place, "auto").comparisons
    if not rows:
        raise UsageProblem(f"{place}: there are no comparisons (pairs or rankings) in it.", "data/empty")
    table = tokenise_comparisons(rows, load_tokenizer(tokenizer_directory), limits)
    if table.num_rows == 0:
        raise UsageProblem(
            f"{place}: each of its {len(rows):,} comparisons has a prompt of more than {limits.max_prompt_tokens:,} "
            "tokens, which the reward model was not trained on (tokens.max_prompt_tokens of the recipe).",
            "data/too-long",
        )
    if untied_pairs(table) == 0:
        raise UsageProblem(f"{place}: no two responses of a prompt are ranked apart in it.", "data/all-ties")
    return table


def check_validating(recipe: Recipe, users: Collection[str]) -> None:
    """Raises UsageProblem where all of these users of the built-in world validate the reward model, or none does: there
    would be nothing to train it on, or nothing to measure it on."""
    validating = sum(validates(recipe, user) for user in users)
    if validating in (0, len(users)):
        raise UsageProblem(
            f"{'None' if validating == 0 else 'Each'} of the {len(users)} users whose prompts are collected "
            f"(world.prompts_collect {recipe.world.prompts_collect}) validates the reward model, at "
            f"collect.held_out_fraction {recipe.collect.held_out_fraction:g} and seed {recipe.seed}; give more "
            "prompts, or change one of the two.",
            "data/split",
        )


def check_tables(tables: Mapping[str, Any]) -> None:
    """Raises UsageProblem where a table could not be trained on: one without rows, or comparisons that are all ties."""
    from corpus.schemas import untied_pairs

    for name, table in tables.items():
        if table.num_rows == 0:
            raise UsageProblem(
                f"The table {name} has no rows: the corpus is too small for its split or its limits.", "data/empty"
            )
        if table_name(name) == "comparisons" and untied_pairs(table) == 0:
            raise UsageProblem(
                f"The table {name} has {table.num_rows:,} rows, and in each of them all responses tie: a reward model "
                "learns from responses that are ranked apart; give more comparisons, or split them otherwise.",
                "data/all-ties",
            )


def _world_tables(recipe: Recipe, tokenizer_directory: Path) -> dict[str, Any]:
    from corpus.tokenising import tokenise_demonstrations, tokenise_pretraining, tokenise_prompts
    from corpus.world import build_world, write_tokenizer
    from models.build import load_tokenizer

    world = build_world(recipe.world, lambda user: validates(recipe, user))
    check_validating(recipe, {row.user_id for row in world.prompts_collect})
    if recipe.model.base is None:
        write_tokenizer(world, tokenizer_directory)
        tokenizer = load_tokenizer(str(tokenizer_directory))
    else:
        tokenizer = load_tokenizer(recipe.model.base)
        tokenizer.save_pretrained(tokenizer_directory)
    limits = recipe.tokens
    return {
        "pretraining-train": tokenise_pretraining(world.pretraining_train, tokenizer, limits),
        "pretraining-valid": tokenise_pretraining(world.pretraining_valid, tokenizer, limits),
        "demonstrations-train": tokenise_demonstrations(world.demonstrations_train, tokenizer, limits),
        "demonstrations-valid": tokenise_demonstrations(world.demonstrations_valid, tokenizer, limits),
        "prompts-collect": tokenise_prompts(world.prompts_collect, tokenizer, limits),
        "prompts-ppo": tokenise_prompts(world.prompts_ppo, tokenizer, limits),
        "prompts-heldout": tokenise_prompts(world.prompts_heldout, tokenizer, limits),
    }


def _file_tables(recipe: Recipe, tokenizer_directory: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The tables by name, and by part how many training rows were left out because their prompt is held out."""
    from corpus.files import load_files
    from corpus.tokenising import (
        tokenise_comparisons,
        tokenise_demonstrations,
        tokenise_pretraining,
        tokenise_prompts,
        train_bpe_tokenizer,
    )
    from models.build import load_tokenizer

    assert recipe.corpus is not None
    corpus = load_files(recipe.corpus)
    if recipe.model.base is None:
        tokenizer = train_bpe_tokenizer(corpus.pretraining_train, recipe.model.vocab_size, tokenizer_directory)
    else:
        tokenizer = load_tokenizer(recipe.model.base)
        tokenizer.save_pretrained(tokenizer_directory)
    if corpus.comparisons_train is None or corpus.comparisons_valid is None:
        raise UsageProblem(
            "The corpus has no comparisons, and there are no people to collect them from: give corpus.comparisons "
            "(chosen/rejected pairs or rankings), or leave corpus out to use the built-in world.",
            "data/no-comparisons",
        )
    limits = recipe.tokens
    tables = {
        "pretraining-train": tokenise_pretraining(corpus.pretraining_train, tokenizer, limits),
        "pretraining-valid": tokenise_pretraining(corpus.pretraining_valid, tokenizer, limits),
        "demonstrations-train": tokenise_demonstrations(corpus.demonstrations_train, tokenizer, limits),
        "demonstrations-valid": tokenise_demonstrations(corpus.demonstrations_valid, tokenizer, limits),
        "prompts-ppo": tokenise_prompts(corpus.prompts_ppo, tokenizer, limits),
        "prompts-heldout": tokenise_prompts(corpus.prompts_heldout, tokenizer, limits),
        "comparisons-train": tokenise_comparisons(corpus.comparisons_train, tokenizer, limits),
        "comparisons-valid": tokenise_comparisons(corpus.comparisons_valid, tokenizer, limits),
    }
    return tables, {part: count for part, count in corpus.left_out.items() if count}
