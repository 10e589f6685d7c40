import dataclasses
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.problems import RunProblem
from models.snapshot import pack, unpack, verify

STATE = {
    "embed": torch.arange(15.0).reshape(3, 5),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "half": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "steps": torch.tensor([1, 2, 3]),
}


@pytest.mark.filterwarnings("error")
def test_what_was_packed_is_unpacked_in_order_shape_and_dtype():
    snapshot = pack(STATE, version=(1, 7))
    restored = dict(unpack(snapshot))
    assert list(restored) == list(STATE)
    for name, tensor in STATE.items():
        assert restored[name].dtype == tensor.dtype
        assert restored[name].equal(tensor)
    verify(snapshot)
    assert snapshot.version == (1, 7)


def test_a_dtype_is_for_floating_point_weights_only():
    restored = dict(unpack(pack(STATE, (0, 0), torch.bfloat16)))
    assert restored["embed"].dtype == torch.bfloat16
    assert restored["embed"].equal(STATE["embed"].bfloat16())
    assert restored["steps"].dtype == torch.int64


def test_unpacked_tensors_are_views_of_the_buffer():
    snapshot = pack(STATE, (0, 0))
    before = dict(unpack(snapshot))["embed"].clone()
    snapshot.buffer[:] = 0
    assert not before.eq(0).all()
    assert dict(unpack(snapshot))["embed"].eq(0).all()


def test_packing_copies_so_that_training_goes_on_without_changing_the_snapshot():
    weight = torch.ones(4)
    snapshot = pack({"w": weight}, (0, 0))
    weight.zero_()
    assert dict(unpack(snapshot))["w"].eq(1).all()


def test_tied_weights_are_stored_once_under_both_names(llama):
    state = llama.state_dict()
    assert "lm_head.weight" in state
    snapshot = pack(state, (0, 0))
    restored = dict(unpack(snapshot))
    assert restored.keys() == state.keys()
    assert restored["lm_head.weight"].data_ptr() == restored["model.embed_tokens.weight"].data_ptr()
    untied = pack({name: weight.clone() for name, weight in state.items()}, (0, 0))
    assert untied.buffer.nbytes - snapshot.buffer.nbytes == state["lm_head.weight"].numel() * 4


def test_views_that_share_memory_but_not_shape_are_not_taken_for_tied():
    whole = torch.arange(8.0)
    restored = dict(unpack(pack({"whole": whole, "first": whole[:4], "square": whole.view(2, 4)}, (0, 0))))
    assert restored["whole"].equal(whole)
    assert restored["first"].equal(whole[:4])
    assert restored["square"].equal(whole.view(2, 4))


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_changed_byte_is_found(place):
    snapshot = pack(STATE, (2, 9))
    snapshot.buffer[place] ^= 1
    with pytest.raises(RunProblem, match="attempt 2, update 9"):
        verify(snapshot)


def test_a_changed_version_or_manifest_is_found():
    snapshot = pack(STATE, (2, 9))
    first = snapshot.manifest[0]
    swapped = [first._replace(name="another"), *snapshot.manifest[1:]]
    for damaged in (dataclasses.replace(snapshot, version=(2, 10)), dataclasses.replace(snapshot, manifest=swapped)):
        with pytest.raises(RunProblem):
            verify(damaged)


def test_equal_weights_have_equal_checksums_and_others_have_not():
    assert pack(STATE, (0, 0)).checksum == pack({k: v.clone() for k, v in STATE.items()}, (0, 0)).checksum
    assert pack(STATE, (0, 0)).checksum != pack({**STATE, "scalar": torch.tensor(2.6)}, (0, 0)).checksum


def test_it_survives_pickling_and_read_only_memory_without_a_warning():
    snapshot = pickle.loads(pickle.dumps(pack(STATE, (0, 0))))
    snapshot.buffer.flags.writeable = False  # as an object store hands it out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify(snapshot)
        assert dict(unpack(snapshot))["embed"].equal(STATE["embed"])


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=6), st.sampled_from([None, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_any_shapes_come_back_and_every_tensor_is_aligned(shapes, dtype):
    state = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    snapshot = pack(state, (0, 0), dtype)
    assert all(entry.offset_bytes % 64 == 0 for entry in snapshot.manifest)
    for name, tensor in unpack(snapshot):
        assert tensor.equal(state[name].to(dtype or torch.float32))
    assert snapshot.buffer.dtype == np.uint8
