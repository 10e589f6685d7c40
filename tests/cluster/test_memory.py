"""Memory and shapes against what torch, transformers and DeepSpeed really hold."""

import pytest
import torch
from transformers import GPT2Config
from transformers.cache_utils import DynamicCache

from actors.settings import RolloutSettings, ScoringSettings
from cluster.memory import (
    GIB,
    activation_bytes,
    engine_bytes,
    generator_memory,
    learner_memory,
    scoring_memory,
    sequences_that_fit,
)
from cluster.model_presets import model_presets
from corpus.problems import UsageProblem
from learners.engine_settings import EngineSettings
from models.build import tiny_llama
from models.settings import TinyLlamaSettings
from models.shape import ModelShape, llama_shape, shape_of_model

WORDS = 300
SETTINGS = TinyLlamaSettings(hidden_size=96, layers=3, heads=6, key_value_heads=2, mlp_size=160)


def llama(settings: TinyLlamaSettings = SETTINGS):
    return tiny_llama(settings, WORDS, pad_id=0, bos_id=None, eos_id=1, seed=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("key_value_heads", [None, 2])
def test_the_shape_of_a_small_llama_is_that_of_the_network(tied, key_value_heads):
    settings = SETTINGS.model_copy(update={"tied_embeddings": tied, "key_value_heads": key_value_heads})
    network = llama(settings)
    assert llama_shape(settings, WORDS).parameters == sum(each.numel() for each in network.parameters())


def test_the_shape_of_a_checkpoint_is_read_from_its_configuration_alone(tmp_path):
    llama().config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert shape_of_model(str(tmp_path)) == llama_shape(SETTINGS, WORDS)


def test_another_architecture_is_read_too(tmp_path):
    GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=32).save_pretrained(tmp_path)
    found = shape_of_model(str(tmp_path))
    assert (found.hidden_size, found.mlp_size, found.head_size, found.key_value_heads) == (64, 256, 16, 4)
    assert found.tied_embeddings


def test_what_is_no_model_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UsageProblem, match="does not exist"):
        shape_of_model(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UsageProblem, match="cannot be made as a causal language model"):
        shape_of_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt3-1.3b", 1.3),  # Brown et al. 2020, table 2.1
        ("gpt3-6.7b", 6.7),
        ("gpt3-175b", 175),
        ("llama-3.2-1b", 1.236),  # the safetensors indices on the Hugging Face Hub
        ("llama-3.1-8b", 8.03),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-7b", 7.616),
    ],
)
def test_presets_have_as_many_weights_as_their_papers_say(name, billions):
    assert model_presets()[name].parameters == pytest.approx(1e9 * billions, rel=0.02)


def test_keys_and_values_take_what_a_cache_of_transformers_takes():
    cache = DynamicCache()
    with torch.no_grad():
        llama()(torch.ones((1, 7), dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    shape = llama_shape(SETTINGS, WORDS)
    assert 7 * shape.key_value_bytes(4) == held
    assert sequences_that_fit(shape, 1, "float32", 7) == (1 << 20) // held
    assert sequences_that_fit(shape, 1, "bfloat16", 7) == (1 << 20) // (held // 2)


@pytest.mark.parametrize("shape", [SETTINGS, TinyLlamaSettings(hidden_size=128, layers=2, heads=4, mlp_size=512)])
def test_activations_are_about_what_autograd_keeps(shape):
    tokens = 256
    network = llama(shape.model_copy(update={"context_length": tokens}))
    weights = {each.untyped_storage().data_ptr() for each in network.parameters()}
    kept: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        hidden = network.model(torch.ones((1, tokens), dtype=torch.int64), use_cache=False).last_hidden_state
    planned = activation_bytes(llama_shape(shape, WORDS), tokens, EngineSettings(), logits=False)
    assert hidden.requires_grad
    assert sum(kept.values()) == pytest.approx(planned, rel=0.25)


def test_checkpointing_keeps_less_and_logits_count_for_every_token():
    shape = llama_shape(SETTINGS, WORDS)
    plain, recomputed = EngineSettings(), EngineSettings(activation_checkpointing=True)
    assert activation_bytes(shape, 64, recomputed, logits=False) < activation_bytes(shape, 64, plain, logits=False)
    more = activation_bytes(shape, 64, plain, logits=True) - activation_bytes(shape, 64, plain, logits=False)
    assert more == 64 * WORDS * 16


def test_each_stage_needs_less_and_three_ranks_hold_a_third_of_what_is_sharded():
    size = 3_000_000_000
    for dtype in ("float32", "bfloat16"):
        totals = [
            sum(engine_bytes(size, 3, EngineSettings(zero_stage=stage, dtype=dtype)).values()) for stage in (1, 2, 3)
        ]
        assert totals == sorted(totals, reverse=True)
    whole, shared = (engine_bytes(size, ranks, EngineSettings(zero_stage=3, dtype="bfloat16")) for ranks in (1, 3))
    for part in ("weights", "masters", "gradients", "moments"):
        assert shared[part] == whole[part] // 3


def test_stage_0_in_bfloat16_is_reckoned_as_stage_1():
    engines = [EngineSettings(zero_stage=stage, dtype="bfloat16") for stage in (0, 1)]
    assert engine_bytes(10**9, 8, engines[0]) == engine_bytes(10**9, 8, engines[1])


def test_a_learner_holds_two_networks_and_on_a_cpu_their_copies_too():
    shape = model_presets()["llama-3.1-8b"]
    engine = EngineSettings(zero_stage=3, dtype="bfloat16")
    gpu, cpu = (learner_memory(shape, 8, engine, device) for device in ("gpu", "cpu"))
    one = engine_bytes(shape.parameters, 8, engine)
    assert one["moments"] < gpu.parts["moments"] < 2 * one["moments"]
    assert gpu.node_bytes > 24 * shape.parameters
    assert cpu.node_bytes == 0
    assert cpu.parts["copies on the CPU"] == gpu.node_bytes


def test_roles_add_up_and_fused_scoring_holds_both_networks():
    shape = model_presets()["qwen2.5-7b"]
    generator = generator_memory(shape, RolloutSettings(gpus=1, dtype="bfloat16", kv_cache_mib=8192), 2048, "gpu")
    assert generator.parts["weights"] == 2 * shape.parameters
    assert generator.parts["keys and values"] == 8 * GIB
    assert generator.total_bytes == sum(generator.parts.values())
    scoring = ScoringSettings(dtype="bfloat16")
    both, reward, reference = (
        scoring_memory(shape, scoring, 1024, 1024, "gpu", frozenset(hosts)).parts["weights"]
        for hosts in (("reward", "reference"), ("reward",), ("reference",))
    )
    assert both == reward + reference
    assert reward < reference


def test_a_divided_generator_has_its_part_on_each_gpu_and_all_of_it_in_a_nodes_memory():
    shape = model_presets()["qwen2.5-7b"]
    settings = RolloutSettings(gpus=2, tensor_parallel=2, dtype="bfloat16", kv_cache_mib=8192)
    whole = generator_memory(shape, settings.model_copy(update={"tensor_parallel": 1}), 2048, "gpu")
    half = generator_memory(shape, settings, 2048, "gpu")
    for part in ("weights", "keys and values"):
        assert 2 * half.parts[part] == pytest.approx(whole.parts[part], rel=1e-6)
    assert half.parts["runtime"] == whole.parts["runtime"]
    assert half.node_bytes == 2 * whole.node_bytes  # in the object store, and where the parts map it
    cpus = generator_memory(shape, settings, 2048, "cpu")
    alone = generator_memory(shape, settings.model_copy(update={"tensor_parallel": 1}), 2048, "cpu")
    assert cpus.parts["runtime"] == 3 * alone.parts["runtime"]
    assert cpus.parts["weights"] == pytest.approx(alone.parts["weights"], rel=1e-6)


def test_key_value_heads_that_are_too_few_are_held_more_than_once():
    shape = model_presets()["qwen2.5-7b"]  # four of them
    fit = [sequences_that_fit(shape, 8192, "bfloat16", 2048, ranks) for ranks in (1, 4, 8)]
    assert fit[0] == fit[1]
    assert fit[2] == fit[0] // 2


def test_the_demos_roles_are_reckoned_near_what_they_were_measured_at():
    """Peaks of the recorded demo, from its metrics: learner 974,745,600 bytes, generator 1,493,147,648, scoring
    713,080,832."""
    shape = llama_shape(TinyLlamaSettings(hidden_size=128, layers=2, heads=4, mlp_size=256), 190)
    learner = learner_memory(shape, 1, EngineSettings(), "cpu").total_bytes
    generator = generator_memory(shape, RolloutSettings(kv_cache_mib=64), 64, "cpu").total_bytes
    hosts = frozenset(("reward", "reference"))
    scoring = scoring_memory(shape, ScoringSettings(), 40, 24, "cpu", hosts).total_bytes
    for planned, measured in ((learner, 974_745_600), (generator, 1_493_147_648), (scoring, 713_080_832)):
        assert measured == pytest.approx(planned, rel=0.25)


def test_a_shape_knows_which_weights_multiply():
    tied = ModelShape(1000, 1, 10, 20, 2, 2, 5, 30, True)
    apart = ModelShape(1300, 1, 10, 20, 2, 2, 5, 30, False)
    assert tied.backbone_matmul_parameters == apart.backbone_matmul_parameters == 700
    assert tied.scalar_parameters == apart.scalar_parameters == 1011
