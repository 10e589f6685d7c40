"""Codes of problems: each that is raised is listed, each that is listed is raised, and the docs have them all."""

import ast
import pickle
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from amenable.error_codes import HTTP_CODES, SYMPTOMS
from corpus.problems import CODE, UNEXPECTED, RunProblem, UsageProblem, code_in_traceback, problem_in_traceback

ROOT = Path(__file__).parents[2]
ROOMS = (
    "amenable",
    "bench",
    "cluster",
    "serving",
    "evaluation",
    "learners",
    "actors",
    "objectives",
    "models",
    "corpus",
)
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
LISTED = [one for symptom in SYMPTOMS for one in symptom.codes]


def problems(sources: list[str]) -> set[str]:
    """The classes of problems: the two, and what is made of them, as far as the sources say."""
    found = {"UsageProblem", "RunProblem"}
    while True:
        more = {
            node.name
            for source in sources
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in found for b in node.bases)
        }
        if more <= found:
            return found
        found |= more


def raised(source: str, classes: set[str], place: int = 1) -> Iterator[tuple[int, str | None]]:
    """Line and code of each place that makes one of the `classes`: the argument at `place`, where it is a text or the
    constant for the unexpected; "passed on" where it is that of another problem; None for anything else."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes):
            continue
        match node.args[place] if len(node.args) > place else None:
            case ast.Constant(value=str() as code):
                yield node.lineno, code
            case ast.Name(id="UNEXPECTED"):
                yield node.lineno, UNEXPECTED
            case ast.Attribute(attr="code"):
                yield node.lineno, "passed on"
            case _:
                yield node.lineno, None


@pytest.fixture(scope="module")
def sites() -> dict[str, str | None]:
    """By place, the code of everything that the program raises."""
    sources = {path: path.read_text() for path in SOURCES}
    classes = problems(list(sources.values()))
    assert {"Unreachable", "Superseded"} <= classes
    return {
        f"{path.relative_to(ROOT)}:{line}": code
        for path, source in sources.items()
        for line, code in raised(source, classes)
    }


def test_codes_are_well_formed_and_unique():
    codes = [one.code for one in LISTED]
    assert [code for code in codes if not re.fullmatch(CODE, code)] == []
    assert sorted(set(codes)) == sorted(codes)
    assert all(one.means.strip() and one.do.strip() for one in (*LISTED, *HTTP_CODES))


def test_every_problem_has_a_code_that_is_listed(sites):
    assert len(sites) > 350
    listed = {one.code for one in LISTED} | {"passed on"}
    assert {place: code for place, code in sites.items() if code not in listed} == {}


def test_every_code_that_is_listed_is_raised(sites):
    assert {one.code for one in LISTED} - set(sites.values()) == set()


def test_a_problem_without_a_code_would_be_seen():
    wrong = 'raise UsageProblem(f"{x} is wrong.")\nraise RunProblem("a", code)\nraise RunProblem("a", "b/c")\n'
    assert list(raised(wrong, {"UsageProblem", "RunProblem"})) == [(1, None), (2, None), (3, "b/c")]
    assert problems(["class Late(RunProblem): ...", "class Later(Late): ..."]) >= {"Late", "Later"}


def test_the_codes_that_are_answered_over_http_are_listed_and_none_else():
    found = {
        code
        for path in sorted((ROOT / "serving").rglob("*.py"))
        for _, code in raised(path.read_text(), {"ApiError", "PageProblem"})
    }
    assert found == {one.code for one in HTTP_CODES}
    assert sorted(found) == [one.code for one in sorted(HTTP_CODES, key=lambda one: one.code)]


@pytest.mark.parametrize("sort", [UsageProblem, RunProblem])
def test_a_problem_keeps_its_code_from_process_to_process(sort):
    problem = sort("x.jsonl, line 3: no prompt.", "data/row")
    for _ in range(3):
        problem = pickle.loads(pickle.dumps(problem))
    assert (type(problem), str(problem), problem.code) == (sort, "x.jsonl, line 3: no prompt.", "data/row")


@pytest.mark.parametrize("sort", [UsageProblem, RunProblem])
def test_a_traceback_has_the_code_where_only_its_text_is_kept(sort):
    def told() -> str:
        try:
            with code_in_traceback():
                raise sort("There is no such file.", "data/not-found")
        except sort as problem:
            return "".join(traceback.format_exception(problem))

    found = problem_in_traceback(told())
    assert found is not None
    assert (type(found), str(found), found.code) == (sort, "There is no such file.", "data/not-found")
    plain = problem_in_traceback(told().replace("[data/not-found]\n", ""))
    assert plain is not None
    assert (str(plain), plain.code) == ("There is no such file.", UNEXPECTED)
    assert problem_in_traceback("Traceback\nValueError: x\n[data/row]\n") is None
