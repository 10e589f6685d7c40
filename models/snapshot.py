"""One flat, versioned, checksummed copy of a network's weights, as it travels from learner to generators.

The buffer is one block of bytes, so that it is copied, hashed, stored and mapped at once; views of it are the weights.
Tied weights, which share storage, are in the buffer once: their names lead to the same offset.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from corpus.problems import RunProblem

ALIGNMENT_BYTES = 64
"""Every tensor starts on a cache line, and so on a multiple of its element size."""


class Entry(NamedTuple):
    """Where one tensor lies in the buffer. `dtype` is torch's name for it, such as "bfloat16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """Weights of one version. `version` is (attempt, update); `checksum` covers version, manifest and buffer."""

    version: tuple[int, int]
    buffer: np.ndarray
    manifest: list[Entry]
    checksum: str


def pack(state: Mapping[str, Tensor], version: tuple[int, int], dtype: torch.dtype | None = None) -> Snapshot:
    """Copy `state` into one new buffer, one copy a tensor; floating-point weights become `dtype` where it is given."""
    manifest: list[Entry] = []
    sources: list[tuple[Entry, Tensor]] = []
    offset_of_storage: dict[tuple, int] = {}
    size_bytes = 0
    for name, tensor in state.items():
        tensor = tensor.detach()
        stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        storage = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        is_new = tensor.numel() == 0 or storage not in offset_of_storage
        offset = size_bytes if is_new else offset_of_storage[storage]
        entry = Entry(name, tuple(tensor.shape), str(stored).removeprefix("torch."), offset)
        manifest.append(entry)
        if is_new:
            offset_of_storage[storage] = offset
            sources.append((entry, tensor))
            size_bytes += -(-tensor.numel() * stored.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    # Zeros, so that the gaps hash the same every time; never empty, so that there is something to take views of.
    buffer = np.zeros(max(size_bytes, ALIGNMENT_BYTES), dtype=np.uint8)
    block = torch.from_numpy(buffer)
    for entry, tensor in sources:
        _view(block, entry).copy_(tensor)
    return Snapshot(version, buffer, manifest, _checksum(version, manifest, buffer))


def unpack(snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in the order they were packed; the tensors are views of the buffer: do not write to them."""
    with warnings.catch_warnings():
        # An object store hands out read-only arrays, and torch warns that it cannot enforce that.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        block = torch.from_numpy(snapshot.buffer)
    for entry in snapshot.manifest:
        yield entry.name, _view(block, entry)


def verify(snapshot: Snapshot) -> None:
    """Raises RunProblem where version, manifest or buffer are not the ones that were packed."""
    if _checksum(snapshot.version, snapshot.manifest, snapshot.buffer) != snapshot.checksum:
        attempt, update = snapshot.version
        raise RunProblem(
            f"The weight snapshot of attempt {attempt}, update {update} is damaged: its checksum does not match.",
            "publication/damaged",
        )


def _view(block: Tensor, entry: Entry) -> Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    size_bytes = int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
    return block[entry.offset_bytes : entry.offset_bytes + size_bytes].view(dtype).view(entry.shape)


def _checksum(version: tuple[int, int], manifest: list[Entry], buffer: np.ndarray) -> str:
    digest = hashlib.sha256(buffer.data)
    digest.update(repr((tuple(version), [tuple(entry) for entry in manifest])).encode())
    return digest.hexdigest()
