"""The checkpoint that all ranks of a learner go on from: the same one, or none of them goes on."""

import torch.distributed as dist

from corpus.problems import RunProblem
from learners.checkpoint import Checkpoint, load_newest
from learners.checkpoint_place import Root


def load_agreed(root: Root, identity: str) -> Checkpoint | None:
    """What `load_newest` gives, the same on every rank; a collective. Nothing is removed before every rank has looked.

    Raises RunProblem, on every rank, where one cannot read what it finds, or where two find different ones: ranks that
    load different states train, publish and save a mixture of them. A file system that lists late, or a disk that reads
    badly, on one node is enough for that.
    """
    checkpoint, problem = None, None
    try:
        checkpoint = load_newest(root, identity)
    except RunProblem as met:
        problem = met
    own = (_named(checkpoint), "" if checkpoint is None else checkpoint.manifest_sha256, problem is not None)
    every: list[tuple[str, str, bool]] = [own] * dist.get_world_size()
    dist.all_gather_object(every, own)
    if problem is not None:
        raise problem
    for rank, (_, _, failed) in enumerate(every):
        if failed:
            raise RunProblem(f"Rank {rank} of the learners could not read the checkpoints.", "checkpoint/unreadable")
    for rank, found in enumerate(every):
        if found != every[0]:
            told = "one of that name with other files" if found[0] == every[0][0] else found[0]
            raise RunProblem(
                f"Rank 0 of the learners would go on from {every[0][0]}, rank {rank} from {told}; all nodes must see "
                "the same files. Nothing was loaded or removed, and once they do the same command continues.",
                "checkpoint/unreadable",
            )
    return checkpoint


def _named(checkpoint: Checkpoint | None) -> str:
    return "no checkpoint" if checkpoint is None else str(checkpoint.path).partition("?")[0]
