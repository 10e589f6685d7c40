"""The arithmetic of an update: FLOP as torch counts them, and who waits for whom."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from actors.settings import RolloutSettings, SamplingSettings, ScoringSettings
from cluster.hardware import hardware_named
from cluster.model_presets import model_presets
from cluster.ppo_time import (
    Constants,
    Learners,
    Machines,
    PpoWork,
    generation_seconds,
    policy_flop,
    prepare_flop,
    scoring_seconds,
    train_flop,
    update_time,
)
from learners.engine_settings import EngineSettings
from learners.ppo_settings import PpoSettings
from models.build import tiny_llama
from models.settings import TinyLlamaSettings
from models.shape import llama_shape

WORDS = 300
SMALL = TinyLlamaSettings(hidden_size=96, layers=3, heads=6, key_value_heads=2, mlp_size=160)


def work_of(**changes) -> PpoWork:
    h100 = hardware_named("h100-80gb")
    work = PpoWork(
        machines=Machines(h100, h100, h100),
        shape=model_presets()["qwen2.5-0.5b"],
        ppo=PpoSettings(),
        sampling=SamplingSettings(),
        max_prompt_tokens=1024,
        learners=Learners(2, 1.0, EngineSettings(dtype="bfloat16")),
        rollouts=RolloutSettings(generators=2, gpus=1, dtype="bfloat16", kv_cache_mib=20_000),
        generator_devices=1.0,
        scoring=ScoringSettings(gpus=1, dtype="bfloat16"),
        scoring_devices=1.0,
    )
    return replace(work, **changes)


@pytest.mark.parametrize("backward", [False, True])
def test_a_pass_costs_what_torch_counts(backward):
    tokens, response = 64, 20
    network = tiny_llama(SMALL, WORDS, pad_id=0, bos_id=None, eos_id=1, seed=0)
    network.config._attn_implementation = "eager"
    counter = FlopCounterMode(display=False)
    with counter:
        hidden = network.model(torch.ones((1, tokens), dtype=torch.int64), use_cache=False).last_hidden_state
        logits = network.lm_head(hidden[:, -response:])
        if backward:
            logits.sum().backward()
    planned = policy_flop(llama_shape(SMALL, WORDS), tokens - response, response) * (3 if backward else 1)
    # torch multiplies whole squares of attention; a causal one is half of that, which is what counts as work.
    assert planned <= counter.get_total_flops() <= 1.15 * planned


def test_training_counts_each_network_three_times_and_checkpointing_a_fourth():
    work, constants = work_of(), Constants()
    plain = train_flop(work, constants)
    recomputed = replace(work, learners=Learners(2, 1.0, EngineSettings(activation_checkpointing=True)))
    assert train_flop(recomputed, constants) == pytest.approx(plain * 4 / 3)
    without = work_of(ppo=PpoSettings(ptx_coefficient=0.0))
    documents = 3 * 512 * 8 * policy_flop(work.shape, 0, 2048)
    assert plain - train_flop(without, constants) == pytest.approx(documents)


def test_recomputing_old_logprobs_adds_the_policys_pass_over_the_whole_batch():
    compared, recomputed = (
        prepare_flop(work_of(ppo=PpoSettings(old_logprobs=which)), Constants()) for which in ("behaviour", "recomputed")
    )
    assert recomputed - compared == pytest.approx((512 - 64) * policy_flop(work_of().shape, 1024, 1024))


def test_at_staleness_0_all_take_turns_and_at_1_the_slowest_sets_the_pace():
    turns = update_time(work_of(), Constants())
    parts = turns.publish_s + turns.generate_s + turns.score_tail_s + turns.prepare_s + turns.train_s
    assert turns.update_s == pytest.approx(parts)
    assert turns.learner_waits_s == pytest.approx(turns.generate_s + turns.score_tail_s)
    beside = update_time(work_of(ppo=PpoSettings(max_staleness=1)), Constants())
    learner = beside.publish_s + beside.prepare_s + beside.train_s
    assert beside.update_s == max(learner, beside.generate_steady_s, beside.score_s)
    assert min(beside.learner_waits_s, beside.generators_wait_s) == 0
    assert beside.update_s < turns.update_s


def test_more_generators_write_a_batch_faster_until_the_longest_response_is_all_there_is():
    seconds = [generation_seconds(work_of().with_generators(count), Constants())[0] for count in (1, 2, 4, 8, 64, 512)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 2 * seconds[3]
    longest = 1024 * Constants().engine_step_s
    assert seconds[-1] > longest


def test_a_divided_engine_is_faster_by_its_devices_less_what_their_sums_take():
    whole, halves = work_of(), work_of(generator_devices=2.0)
    divided = replace(halves, rollouts=whole.rollouts.model_copy(update={"tensor_parallel": 2}))
    one, free, two = (generation_seconds(each, Constants())[0] for each in (whole, halves, divided))
    assert free < two < one
    steps = (two - free) / (2 * whole.shape.layers * Constants().all_reduce_s)
    assert steps == pytest.approx(1024, rel=1.0)  # as many as the longest response has, or some more
    assert generation_seconds(divided, replace(Constants(), all_reduce_s=0.0))[0] == pytest.approx(free)


def test_a_small_cache_of_keys_and_values_makes_generation_slower():
    roomy, tight = (
        generation_seconds(work_of(rollouts=work_of().rollouts.model_copy(update={"kv_cache_mib": mib})), Constants())[
            0
        ]
        for mib in (20_000, 500)
    )
    assert tight > 2 * roomy


def test_scoring_of_two_processes_is_as_slow_as_the_slower_one():
    fused = scoring_seconds(work_of(), Constants())
    apart = scoring_seconds(work_of(scoring=ScoringSettings(gpus=1, dtype="bfloat16", fused=False)), Constants())
    two = scoring_seconds(work_of(scoring=ScoringSettings(gpus=1, dtype="bfloat16", scorers=2)), Constants())
    assert apart < fused
    assert two == pytest.approx(fused / 2)


def test_a_faster_device_is_never_slower():
    l4, h100 = hardware_named("l4-24gb"), hardware_named("h100-80gb")
    slow, fast = (update_time(work_of(machines=Machines(each, each, each)), Constants()) for each in (l4, h100))
    for phase in ("generate_s", "score_s", "prepare_s", "train_s", "update_s"):
        assert getattr(fast, phase) < getattr(slow, phase)
