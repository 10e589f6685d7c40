"""The language-model stages: base, SFT and ppo-init, each one job of the learner group."""

from amenable.stage_reuse import StageSpec
from amenable.stages.context import Context, Finished
from amenable.stages.sampling import start_generators
from learners.language_model_settings import LanguageModelSettings, SftEpoch
from models.settings import TinyLlamaSettings

LOGS = ("metrics.jsonl", "tensorboard")


def run_base(context: Context, spec: StageSpec) -> Finished:
    """Trains a small model on pretraining text."""
    recipe = context.recipe
    return _train(context, spec, recipe.base, recipe.model.shape, seed=recipe.seed, demonstrations=False)


def run_sft(context: Context, spec: StageSpec) -> Finished:
    """Fine-tunes the base model on demonstrations and keeps every epoch."""
    start_generators(context)  # vLLM's imports take a while: let them, beside the training
    recipe = context.recipe
    return _train(context, spec, recipe.sft, context.base_model(), seed=recipe.seed + 1, demonstrations=True)


def run_ppo_init(context: Context, spec: StageSpec) -> Finished:
    """A short SFT from the base model with a pretraining mix: what PPO starts from and is held to."""
    recipe = context.recipe
    return _train(context, spec, recipe.ppo_init, context.base_model(), seed=recipe.seed + 2, demonstrations=True)


def _train(
    context: Context,
    spec: StageSpec,
    settings: LanguageModelSettings,
    start: str | TinyLlamaSettings,
    seed: int,
    demonstrations: bool,
) -> Finished:
    from learners.language_model import LanguageModelJob, train_language_model

    documents = not demonstrations or settings.pretraining_share > 0
    job = LanguageModelJob(
        stage=spec.name,
        identity=context.identity(spec),
        settings=settings,
        engine=context.recipe.learners.engine,
        seed=seed,
        directory=spec.directory,
        stored=context.run.stored,
        tracked=context.tracked(),
        tokenizer=context.tokenizer,
        start=start,
        max_new_tokens=context.recipe.sampling.max_response_tokens,
        demonstrations=context.data("demonstrations-train") if demonstrations else None,
        demonstrations_valid=context.data("demonstrations-valid") if demonstrations else None,
        pretraining=context.data("pretraining-train") if documents else None,
        pretraining_valid=None if demonstrations else context.data("pretraining-valid"),
    )
    result = context.learn(train_language_model, job)
    exports = [spec.directory / each["directory"] for each in result["exports"]]
    return Finished([*exports, *(spec.directory / name for name in LOGS)], result)


def sft_epoch(context: Context, which: SftEpoch) -> str:
    """The directory of an SFT epoch that was exported."""
    exports = context.values(context.run.sft)["exports"]
    best = min(exports, key=lambda each: each.get("valid_loss", float("inf")))
    return str(context.run.sft / (best if which == "best_validation" else exports[-1])["directory"])
