"""What ranks tell each other of a failure, in a group of one process."""

import logging

import pytest

from corpus.problems import UNEXPECTED, RunProblem
from learners.process_group import _as_sent, problem_of_ranks

pytestmark = pytest.mark.usefixtures("one_process")


def failed() -> Exception:
    try:
        return [][0]
    except IndexError as error:
        return error


def test_a_mistake_of_the_program_is_logged_with_its_traceback_where_it_was_made(caplog):
    problem = failed()
    assert problem_of_ranks(problem) is problem
    [record] = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "learner rank 0 failed")
    assert "return [][0]" in caplog.text
    sent = _as_sent(problem)
    assert (str(sent), sent.code) == ("Learner rank 0 failed: IndexError: list index out of range.", UNEXPECTED)


def test_a_problem_with_a_sentence_is_sent_as_it_is_and_needs_no_log(caplog):
    problem = RunProblem("the stream died", "run/process-died")
    assert problem_of_ranks(problem) is problem
    assert not caplog.records
