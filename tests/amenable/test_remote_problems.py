"""The sentence for a person is found inside what Ray wraps around it: with Ray's own classes, without its processes."""

import errno
import os
import subprocess
import sys

import pytest

from amenable.remote_problems import problem_in
from corpus.problems import RunProblem, UsageProblem

# In a process of its own: Ray takes seconds to import, and the command must not need it.
WITH_RAY = """
import traceback
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from amenable.remote_problems import problem_in
from corpus.problems import RunProblem, UsageProblem

def remote(cause):
    try:
        raise cause
    except Exception as error:
        return RayTaskError("f", traceback.format_exc(), error, proctitle="ray::f", pid=1, ip="127.0.0.1")

def both(cause):
    return remote(cause).as_instanceof_cause()

def check(error, sort, text):
    found = problem_in(error)
    assert type(found) is sort and str(found) == text, (error, found)

loss = RunProblem("The loss is NaN at step 3.")
check(remote(loss), RunProblem, "The loss is NaN at step 3.")
assert isinstance(both(loss), RunProblem) and "Traceback" not in str(loss) and str(both(loss)) != str(loss)
check(both(loss), RunProblem, "The loss is NaN at step 3.")
check(both(both(loss)), RunProblem, "The loss is NaN at step 3.")
check(WorkerGroupError("rank 0 failed", {0: ValueError("x"), 1: loss}), RunProblem, str(loss))
check(WorkerGroupError("rank 0 failed", {0: UserExceptionWithTraceback(loss, "Traceback …")}), RunProblem, str(loss))
check(ControllerError(both(loss)), RunProblem, str(loss))
data = UsageProblem("some.jsonl, line 3: there is no prompt.")
died = ActorDiedError(remote(data))
check(died, UsageProblem, str(data))
for other in (ActorDiedError(), remote(KeyError("x")), WorkerGroupError("killed", {0: MemoryError()})):
    assert problem_in(other) is None, other
print("checked")
"""


@pytest.mark.slow
def test_a_problem_is_found_in_every_wrapping_of_ray():
    run = subprocess.run([sys.executable, "-c", WITH_RAY], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("checked")


class Wrapped(Exception):
    """An error with the attributes that Ray's have."""

    def __init__(self, text: str = "", **attributes: object) -> None:
        super().__init__(text)
        self.__dict__.update(attributes)


class WrappedProblem(Wrapped, RunProblem):
    """Ray's error that is the problem too, with a traceback for its text."""


LOSS = RunProblem("The loss is NaN.")
DIED = "The actor died because of an error raised in its creation task, ray::A.__init__()\n  File …\n"


@pytest.mark.parametrize(
    "error",
    [
        Wrapped(cause=LOSS),
        WrappedProblem("Traceback …", cause=LOSS),
        Wrapped(cause=WrappedProblem("Traceback …", cause=LOSS)),
        Wrapped(worker_failures={0: ValueError("x"), 1: Wrapped(_base_exc=LOSS)}),
        Wrapped(controller_failure=LOSS),
        Wrapped(f"{DIED}corpus.problems.RunProblem: The loss is NaN.", actor_init_failed=True),
    ],
)
def test_a_problem_is_found_behind_the_attributes_of_rays_errors(error):
    found = problem_in(error)
    assert type(found) is RunProblem
    assert str(found) == "The loss is NaN."


def test_the_text_of_an_actor_that_died_otherwise_is_not_searched():
    assert problem_in(Wrapped(f"{DIED}corpus.problems.RunProblem: x", actor_init_failed=False)) is None


def test_a_problem_is_itself_even_where_another_caused_it():
    outer = UsageProblem("outer")
    outer.__cause__ = RunProblem("inner")
    assert problem_in(outer) is outer


def test_a_problem_behind_pythons_cause_is_found():
    wrapper = RuntimeError("stage failed")
    wrapper.__cause__ = RunProblem("inner")
    assert problem_in(wrapper) is wrapper.__cause__


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("UsageProblem: not one"), RuntimeError("RunProblem: no")])
def test_what_is_no_problem_is_left_alone(error):
    assert problem_in(error) is None


def test_a_circle_of_causes_ends():
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert problem_in(one) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_problem_of_one_sentence_wherever_it_happened(number):
    full = OSError(number, os.strerror(number), "runs/demo/sft/model.safetensors")
    found = problem_in(Wrapped(cause=full))
    assert isinstance(found, RunProblem)
    assert "disk is full" in str(found)
    assert "runs/demo/sft/model.safetensors" in str(found)
    assert problem_in(Wrapped(cause=OSError(errno.EACCES, "Permission denied"))) is None
