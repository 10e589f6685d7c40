"""A failure that trying again cannot mend, recorded in the run's directory so that later attempts end at once.

Only where something else than a person starts attempts: KubeRay makes a new cluster for every retry of a failed job,
GPUs and all, whatever it failed of. There the environment variable AMENABLE_ATTEMPT is set (the manifests
set it, and so may any other starter of attempts). On one's own machine nothing is recorded and nothing is looked up.

Permanent is what a person must change: a recipe that is wrong, data that a stage cannot read, a process that takes more
memory than any node of the cluster has (a retry makes a cluster like it). A problem that an input
or output error was behind (a store or a service that did not answer) is not, nor is a run that somebody else holds. The
record names the recipe and the version of the program; with another recipe, or another version, it counts no more.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pyarrow import fs

from amenable.json_files import write_json
from amenable.recipe_loading import recipe_hash
from amenable.remote_problems import problem_in
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import below, is_object_store, named, one_line, opened

if TYPE_CHECKING:
    from amenable.recipe import Recipe

ATTEMPT = "AMENABLE_ATTEMPT"
"""Environment variable: who starts this attempt. Not set, or empty: a person."""

TOO_SMALL = "cluster/too-small"
"""The code of a RunProblem that is permanent too: a process fits on no node."""

FAILURE_FILE = "failure.json"


@dataclass(frozen=True)
class PermanentFailure:
    """What failure.json says."""

    schema_version: int
    identity: str
    """Of the recipe, or, where it could not be read, of what is wrong with it; and of the program."""
    where: str
    problem: str
    when: str


def is_automatic() -> bool:
    """Whether something else than a person starts the attempts at this run."""
    return bool(os.environ.get(ATTEMPT))


def loaded(load: Callable[[], "Recipe"], check: Callable[["Recipe"], None], run: str | None) -> "Recipe":
    """What `load` returns, a recipe that `check` lets pass. `run` is the run's directory where the command names it.

    Under automatic attempts a UsageProblem of either is recorded, where a directory is known, and one that an earlier
    attempt recorded of the same recipe is raised again before anything else is done.
    """
    if not is_automatic():
        return load()
    try:
        recipe = load()
    except UsageProblem as problem:
        if run is not None:
            _record(run, _identity(str(problem)), "the recipe", problem)
        raise
    place, identity = run or recipe.run_directory, _identity(recipe_hash(recipe))
    _refuse_again(place, identity)
    try:
        check(recipe)
    except UsageProblem as problem:
        _record(place, identity, "the recipe", problem)
        raise
    return recipe


@contextmanager
def recorded(recipe: "Recipe", where: str) -> Iterator[None]:
    """Around work on the run of `recipe`: a permanent failure of it is recorded, under automatic attempts."""
    try:
        yield
    except Exception as error:
        problem = problem_in(error)
        if is_automatic() and problem is not None and _is_permanent(problem) and not _is_of_io(error):
            _record(recipe.run_directory, _identity(recipe_hash(recipe)), where, problem)
        raise


def _is_permanent(problem: UsageProblem | RunProblem) -> bool:
    return isinstance(problem, UsageProblem) or problem.code == TOO_SMALL


def read_failure(run_directory: str) -> PermanentFailure | None:
    """What is recorded of the run in a directory or at an address; None where nothing is, or nothing that can be read.

    Raises RunProblem where the place cannot be reached.
    """
    try:
        content = json.loads(_read(run_directory))
        return PermanentFailure(**content)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def _refuse_again(run_directory: str, identity: str) -> None:
    known = read_failure(run_directory)
    if known is None:
        return
    if known.identity != identity:
        _remove(run_directory)
        return
    raise UsageProblem(
        f"An earlier attempt with this recipe failed for good ({known.where}, {known.when}): {known.problem} Change "
        f"the recipe or its data; after a change of data or of the cluster alone, remove {_name(run_directory)}.",
        "run/failed-for-good",
    )


def _record(run_directory: str, identity: str, where: str, problem: UsageProblem | RunProblem) -> None:
    """Writes the record. That it cannot be written is not told: what went wrong is what a person must hear of."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    content = asdict(PermanentFailure(1, identity, where, f"{problem} [{problem.code}]", when))
    try:
        if is_object_store(run_directory):
            filesystem, inner = opened(below(run_directory, FAILURE_FILE))
            with filesystem.open_output_stream(inner) as stream:
                stream.write(json.dumps(content, indent=2, ensure_ascii=False).encode())
        else:
            path = Path(run_directory).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / FAILURE_FILE, content)
    except (OSError, RunProblem, UsageProblem) as second:
        problem.add_note(f"It could not be recorded in {run_directory}: {one_line(second)}")


def _read(run_directory: str) -> bytes:
    if not is_object_store(run_directory):
        return (Path(run_directory).expanduser() / FAILURE_FILE).read_bytes()
    filesystem, inner = opened(below(run_directory, FAILURE_FILE))
    try:
        if filesystem.get_file_info(inner).type == fs.FileType.NotFound:
            raise FileNotFoundError(inner)
        with filesystem.open_input_stream(inner) as stream:
            return stream.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunProblem(f"{_name(run_directory)} cannot be read ({one_line(error)}).", "storage/read") from error


def _remove(run_directory: str) -> None:
    if is_object_store(run_directory):
        filesystem, inner = opened(below(run_directory, FAILURE_FILE))
        filesystem.delete_file(inner)
    else:
        (Path(run_directory).expanduser() / FAILURE_FILE).unlink(missing_ok=True)


def _name(run_directory: str) -> str:
    place = below(run_directory, FAILURE_FILE)
    return named(place, opened(place)[1])


def _identity(of: str) -> str:
    return hashlib.sha256(f"{version('amenable')}\0{of}".encode()).hexdigest()


def _is_of_io(error: BaseException) -> bool:
    """Whether an input or output error is behind `error`, however it was wrapped."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError):
            return True
        behind = (current.__cause__, current.__context__, getattr(current, "cause", None))
        waiting.extend(each for each in behind if isinstance(each, BaseException))
    return False
