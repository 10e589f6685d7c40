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
from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayTaskError, WorkerCrashedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
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
    return found.code

loss = RunProblem("The loss is NaN at step 3.", "learners/not-finite")
assert check(remote(loss), RunProblem, "The loss is NaN at step 3.") == "learners/not-finite"
assert isinstance(both(loss), RunProblem) and "Traceback" not in str(loss) and str(both(loss)) != str(loss)
check(both(loss), RunProblem, "The loss is NaN at step 3.")
check(both(both(loss)), RunProblem, "The loss is NaN at step 3.")
check(WorkerGroupError("rank 0 failed", {0: ValueError("x"), 1: loss}), RunProblem, str(loss))
check(WorkerGroupError("rank 0 failed", {0: UserExceptionWithTraceback(loss, "Traceback …")}), RunProblem, str(loss))
check(ControllerError(both(loss)), RunProblem, str(loss))
data = UsageProblem("some.jsonl, line 3: there is no prompt.", "data/row")
data.add_note("[data/row]")
died = ActorDiedError(remote(data))
assert check(died, UsageProblem, str(data)) == "data/row"
again = "the same command continues from what was last saved."
killed = f"A process of the run died: its process was killed or crashed; {again}"
check(ActorDiedError(), RunProblem, killed)
check(remote(ActorDiedError()), RunProblem, killed)
check(WorkerCrashedError(), RunProblem, killed)
check(WorkerGroupError("rank 0", {0: WorkerHealthCheckFailedError("lost", ActorDiedError())}), RunProblem, killed)
check(OutOfMemoryError("…"), RunProblem, f"A process of the run died: its machine ran short of memory; {again}")
bug = ActorDiedError(remote(KeyError("x")))
for other in (bug, remote(KeyError("x")), WorkerGroupError("killed", {0: MemoryError()}), GetTimeoutError("late")):
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
        Exception.__init__(self, text)
        self.__dict__.update(attributes)


class WrappedProblem(Wrapped, RunProblem):
    """Ray's error that is the problem too, with a traceback for its text."""


LOSS = RunProblem("The loss is NaN.", "run/unexpected")
DIED = "The actor died because of an error raised in its creation task, ray::A.__init__()\n  File …\n"


@pytest.mark.parametrize(
    "error",
    [
        Wrapped(cause=LOSS),
        WrappedProblem("Traceback …", cause=LOSS),
        Wrapped(cause=WrappedProblem("Traceback …", cause=LOSS)),
        Wrapped(worker_failures={0: ValueError("x"), 1: Wrapped(_base_exc=LOSS)}),
        Wrapped(controller_failure=LOSS),
        Wrapped(f"{DIED}corpus.problems.RunProblem: The loss is NaN.\n[run/unexpected]", actor_init_failed=True),
    ],
)
def test_a_problem_is_found_behind_the_attributes_of_rays_errors(error):
    found = problem_in(error)
    assert type(found) is RunProblem
    assert str(found) == "The loss is NaN."


def test_the_text_of_an_actor_that_died_otherwise_is_not_searched():
    assert problem_in(Wrapped(f"{DIED}corpus.problems.RunProblem: x", actor_init_failed=False)) is None


class RayActorError(Wrapped):
    """An error with the name and the home of Ray's."""


RayActorError.__module__ = "ray.exceptions"
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: {name}
\tactor_id: 5f
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"""


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("RolloutGenerator", "A generator"),
        ("Desk", "The learners' desk"),
        ("actors.stream.EpisodeStream", "The episode stream"),
        ("Other", "The actor Other"),
    ],
)
def test_a_death_is_a_problem_of_one_sentence_that_says_whose(name, who):
    for error in (RayActorError(KILLED.format(name=name)), Wrapped(cause=RayActorError(KILLED.format(name=name)))):
        found = problem_in(error)
        assert isinstance(found, RunProblem)
        assert str(found) == (
            f"{who} died: its process was killed or crashed; the same command continues from what was last saved."
        )


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("Task was killed due to the node running low on memory.", "its machine ran short of memory"),
        ("The actor died because its node has died.", "its machine, or Ray on it, was lost"),
    ],
)
def test_a_death_says_what_is_known_of_its_cause(text, cause):
    assert f"died: {cause};" in str(problem_in(RayActorError(text)))


def test_a_problem_beside_a_death_is_what_is_told():
    assert problem_in(Wrapped(worker_failures={0: RayActorError("…"), 1: Wrapped(cause=LOSS)})) is LOSS


def test_an_actor_that_was_never_made_did_not_die():
    assert problem_in(RayActorError("KeyError: 'x'", actor_init_failed=True)) is None


def test_an_error_of_another_library_with_the_same_name_is_no_death():
    class OutOfMemoryError(Exception):
        """As torch has one."""

    assert problem_in(OutOfMemoryError("CUDA out of memory")) is None


def test_a_problem_is_itself_even_where_another_caused_it():
    outer = UsageProblem("outer", "data/row")
    outer.__cause__ = RunProblem("inner", "run/unexpected")
    assert problem_in(outer) is outer


def test_a_problem_behind_pythons_cause_is_found():
    wrapper = RuntimeError("stage failed")
    wrapper.__cause__ = RunProblem("inner", "run/unexpected")
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
