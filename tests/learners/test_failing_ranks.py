"""Two real ranks of a PPO learner whose stream has died: both end at once, with the same sentence."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from toy_ppo import job_of, settings_of, write_given

HERE = Path(__file__).parent


@pytest.mark.slow
def test_where_no_checkpoint_can_be_written_either_no_rank_waits_for_the_other(tmp_path, tokenizer_directory):
    given = write_given(tmp_path / "given", tokenizer_directory)
    job = job_of(given, tmp_path / "ppo", tokenizer_directory, settings_of(), None, None)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "failing_ranks.py"), str(rank), str(tmp_path)],
            env=environment | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [out.splitlines()[-1:] for out, _ in said] == [["RunProblem: the stream died"]] * 2, said
