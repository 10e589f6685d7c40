"""One rank of several, run as `python resume_ranks.py RANK WORLD STORE JOB STOP_AFTER UNSEEN`.

It trains JOB, a pickled LanguageModelJob or PpoJob, from its newest checkpoint on, and is asked to stop at the question
of that number. Asserts that the state it goes on with is the checkpoint's, to the last bit. Ranks but the first do not
see a checkpoint of the name UNSEEN, as where a network file system lists it late.
"""

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from recording_worker import RecordingWorker
from two_ranks import train_ppo

from corpus.problems import RunProblem
from learners.checkpoint_place import CheckpointPlace
from learners.engine import MOMENTS, Engine
from learners.language_model import train_language_model
from learners.ppo_job import PpoJob
from learners.process_group import process_group
from learners.worker import Interrupted, Worker


def check_what_is_loaded() -> list[int]:
    """From now on an engine that loads a state must have it; returns the list in which such loads are noted."""
    load, loads = Engine.load_state, []

    def load_state(self: Engine, state: dict[str, Any]) -> None:
        load(self, state)
        present = self.state()
        loads.append(state["steps"])
        assert present["steps"] == state["steps"]
        for part in ("weights", *MOMENTS):
            assert present[part].keys() == state[part].keys()
            for name, tensor in state[part].items():
                assert torch.equal(present[part][name], tensor), (part, name)

    setattr(Engine, "load_state", load_state)  # noqa: B010 - type checkers refuse the plain form
    return loads


def main(rank: int, world: int, store: str, job: Path, stop_after: int, unseen: str) -> None:
    torch.set_num_threads(1)
    names = CheckpointPlace.names
    if rank > 0:
        setattr(CheckpointPlace, "names", lambda place: [name for name in names(place) if name != unseen])  # noqa: B010
    loads = check_what_is_loaded()
    plain = RecordingWorker(stop_after)
    with process_group(rank, world, store):
        try:
            given = pickle.loads(job.read_bytes())
            train = train_ppo if isinstance(given, PpoJob) else train_language_model
            train(given, Worker(rank, world, plain.report, plain.should_stop))
        except Interrupted as stop:
            print(f"stopped at {stop}")
        except RunProblem as problem:
            print(f"refused: {problem}")
    print(f"loaded {loads}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
