"""The torch.distributed process group that engines need: our own of one process, or the one that Ray Train made."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from corpus.deaths import death, is_death
from corpus.problems import UNEXPECTED, RunProblem, UsageProblem

log = logging.getLogger(__name__)


def backend() -> str:
    """`nccl` where a CUDA device is visible, else `gloo`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def process_group(rank: int = 0, world_size: int = 1, store: str | None = None) -> Iterator[None]:
    """A default process group for the block.

    Inside a group that exists already (a Ray Train worker) it changes nothing and leaves that group alone. Otherwise
    it makes one of `world_size` processes that meet at the file `store`, by default one process alone, and destroys it
    at the end.
    """
    os.environ.setdefault("LOCAL_RANK", str(rank))  # DeepSpeed reads its device index from here
    if dist.is_initialized():
        yield
        return
    if world_size > 1 and store is None:
        raise ValueError("a process group of several processes needs the path of a store that all of them name")
    with tempfile.TemporaryDirectory() as own:
        path = store or os.path.join(own, "store")
        dist.init_process_group(backend(), init_method=f"file://{path}", rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()


def device() -> torch.device:
    """Device of this process: its CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(*values: float) -> list[float]:
    """Sums of the numbers over all ranks, in float64, the same on every rank."""
    totals = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(totals)
    return totals.tolist()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: the same answer on every rank."""
    return sum_over_ranks(float(flag))[0] > 0


def problem_of_ranks(problem: Exception | None) -> Exception:
    """What to raise where some rank has a problem: this rank's own, else what the lowest rank with one says, so that
    whoever is heard first says what was wrong; a collective, for which some rank must have one. A mistake of the
    program is logged where it was made: its traceback is no part of what other ranks say of it."""
    every: list[UsageProblem | RunProblem | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, None if problem is None else _as_sent(problem))
    return problem or next(each for each in every if each is not None)


def _as_sent(problem: Exception) -> UsageProblem | RunProblem:
    """A problem as other ranks can read it: what an actor has raised is of a class that Ray makes where it arrives, and
    no other process knows."""
    if isinstance(problem, UsageProblem | RunProblem):
        sort = UsageProblem if isinstance(problem, UsageProblem) else RunProblem
        return sort(problem.sentence, problem.code)
    if is_death(problem):
        return death(problem)
    log.error("learner rank %d failed", dist.get_rank(), exc_info=problem)
    text = " ".join(str(problem).split())[:400].rstrip(". ")
    return RunProblem(f"Learner rank {dist.get_rank()} failed: {type(problem).__name__}: {text}.", UNEXPECTED)
