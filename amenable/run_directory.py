"""Where everything of a run lies (docs/architecture.md holds the map), and the files that say what the run was."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from amenable.json_files import write_json, write_text
from amenable.lineage import lineage
from amenable.recipe_loading import resolved
from amenable.run_lease import LEASE_FILE, LOCK_FILE, RunLease
from amenable.stage_reuse import STAGE_FILE
from amenable.store_lease import LEASES, StoreLease
from amenable.summary import Summary
from corpus import audit_log
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import is_object_store, one_line, opened, send, without_options
from corpus.stored_directory import StoredDirectory
from corpus.working_copies import working_copy

_MARKS_OF_A_RUN = {"recipe.yaml", "lineage.json", LEASE_FILE, LOCK_FILE}
_MARKS_IN_A_STORE = ("recipe.yaml", "lineage.json", LEASES, audit_log.DIRECTORY)
_ON_ONE_SIDE = frozenset(
    {"checkpoints", "wandb", "weights", "ray-train", "published", "serving"}
    | {LEASE_FILE, LOCK_FILE, LEASES, audit_log.DIRECTORY}
)
"""What working copy and store do not share: checkpoints and published weights go to the store by themselves, what is
served is a service's, the rest is of no use there."""


@dataclass(frozen=True)
class RoundDirectory:
    """The stages of one round of fresh comparisons."""

    root: Path

    @property
    def collect(self) -> Path:
        return self.root / "collect"

    @property
    def reward_model(self) -> Path:
        return self.root / "rm"

    @property
    def select_sft(self) -> Path:
        return self.root / "select-sft"

    @property
    def ppo_init(self) -> Path:
        return self.root / "ppo-init"

    @property
    def ppo(self) -> Path:
        return self.root / "ppo"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval"


class RunDirectory:
    """The directory of one run. `root` is absolute, because Ray Train's workers change their working directory.

    A run that an object store keeps has its working copy in `root`; `stored` is both, and None for any other run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises UsageProblem for an address that cannot be understood."""
        self.stored: StoredDirectory | None = None
        if is_object_store(path):
            self.root = working_copy(str(path))
            self.stored = StoredDirectory(str(path), self.root, _ON_ONE_SIDE, frozenset({STAGE_FILE}))
        else:
            self.root = Path(os.path.abspath(os.path.expanduser(path)))

    @classmethod
    def find(cls, run: str) -> "RunDirectory":
        """The existing run meant by `run`: a path, or the name of a run in ./runs. Raises UsageProblem without one."""
        if not run:
            raise UsageProblem(
                "The name of the run is empty; name the directory of a run, such as runs/demo.", "run/not-found"
            )
        if is_object_store(run):
            found = cls(run)
            if found.is_stored():
                return found
            raise UsageProblem(f"There is no run in {found.name}; name the address of a run.", "run/not-found")
        places = [Path(run)]
        if os.sep not in run and run not in (".", ".."):
            places.append(Path("runs") / run)
        for place in places:
            try:
                if place.is_dir() and cls(place).is_a_run():
                    return cls(place)
            except OSError as error:  # a directory that may not be looked into, a name that is too long
                raise UsageProblem(f"{place}: the run cannot be reached ({error.strerror}).", "storage/read") from None
        looked = " or ".join(str(place) for place in places)
        raise UsageProblem(
            f"There is no run in {looked}; name the directory of a run, such as runs/demo.", "run/not-found"
        )

    def is_a_run(self) -> bool:
        """True where the directory bears the marks of a run."""
        return any((self.root / mark).exists() for mark in _MARKS_OF_A_RUN)

    @property
    def name(self) -> str:
        """What people are told of where the run is: its path, or its address without options."""
        if self.stored is None:
            return str(self.root)
        return without_options(self.stored.address)

    @property
    def place(self) -> str:
        """Where the run is kept: its path, or its address with options, as programs need it."""
        return str(self.root) if self.stored is None else self.stored.address

    def is_stored(self) -> bool:
        """True where an object store holds the marks of this run. Raises UsageProblem where it cannot be asked."""
        assert self.stored is not None
        try:
            return any(self.stored.holds(mark) for mark in _MARKS_IN_A_STORE)
        except RunProblem as problem:
            raise UsageProblem(str(problem), problem.code) from problem

    @contextmanager
    def for_reading(self) -> Iterator["RunDirectory"]:
        """The run as it is now, without its models: the directory itself, or, where a store keeps it, a copy that is
        there within the block and that a command which works on the run does not see."""
        if self.stored is None:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="amenable-") as temporary:
            copy = StoredDirectory(self.stored.address, Path(temporary), self.stored.local, self.stored.commits)
            copy.pull(lambda path: not path.endswith((".safetensors", ".bin")))
            yield RunDirectory(temporary)

    def keep_report(self, report: Path) -> str:
        """Keeps a report that was made of the run `for_reading`; returns the path or address that people find it at."""
        if self.stored is None:
            return str(report)
        filesystem, inner = opened(self.stored.address)
        try:
            send(report, filesystem, f"{inner}/{report.name}")
        except OSError as error:
            raise RunProblem(
                f"{self.name}: the report could not be written there ({one_line(error)}).", "storage/write"
            ) from error
        return f"{self.name}/{report.name}"

    def create(self) -> None:
        """Makes the directory. Raises UsageProblem where it, or the place in an object store, holds files that are not
        a run's, or cannot be reached."""
        if self.stored is not None:
            try:
                strange = not self.is_stored() and not self.stored.is_empty()
            except RunProblem as problem:
                raise UsageProblem(str(problem), problem.code) from problem
            if strange:
                raise UsageProblem(
                    f"{self.name} holds files that are not a run's; give the run a new or empty place with --run.",
                    "run/directory",
                )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            foreign = self.stored is None and not self.is_a_run() and any(self.root.iterdir())
        except (FileExistsError, NotADirectoryError):
            raise UsageProblem(
                f"{self.root} is a file; give the run a directory with --run.", "run/directory"
            ) from None
        except OSError as error:
            raise UsageProblem(
                f"The run directory {self.root} cannot be made ({error.strerror}).", "run/directory"
            ) from None
        if foreign:
            raise UsageProblem(
                f"{self.root} holds files that are not a run's; give the run a new or empty directory with --run.",
                "run/directory",
            )

    def lease(self) -> RunLease | StoreLease:
        """The right to write here, as a context manager; a live holder refuses a second (see RunLease, StoreLease)."""
        return RunLease(self.root) if self.stored is None else StoreLease(self.stored.address, self.root)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def lineage(self) -> Path:
        return self.root / "lineage.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def tokenizer(self) -> Path:
        return self.data / "tokenizer"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def sft(self) -> Path:
        return self.root / "sft"

    def table(self, name: str, split: str) -> Path:
        """The Parquet file of one table and split: `data/demonstrations-train.parquet`."""
        return self.data / f"{name}-{split}.parquet"

    def sft_epoch(self, epoch: int) -> Path:
        """The Hugging Face directory of SFT's weights after `epoch` epochs, counted from 1."""
        return self.sft / f"epoch-{epoch:02d}"

    def round(self, number: int) -> RoundDirectory:
        """The directories of round `number`, counted from 1."""
        return RoundDirectory(self.root / f"round-{number:02d}")

    def latest_results(self) -> Path | None:
        """results.json of the last round that has been evaluated; None where none has."""
        found = sorted(self.root.glob("round-*/eval/results.json"))
        return found[-1] if found else None

    def relative(self, path: Path) -> str:
        """`path` as it is called inside the run: 'round-01/ppo'."""
        return path.relative_to(self.root).as_posix()

    def write_recipe(self, recipe: BaseModel) -> None:
        """Writes recipe.yaml: what the run was told, every default stated."""
        write_text(self.recipe, resolved(recipe))

    def write_lineage(
        self,
        run: str,
        data_hashes: dict[str, str],
        data_sets: dict[str, dict[str, str]],
        models: dict[str, dict[str, str]],
    ) -> None:
        """Writes lineage.json anew from the stages that are complete; when the run was created is kept."""
        write_json(self.lineage, lineage(self.root, run, data_hashes, data_sets, models))

    def write_summary(self, summary: Summary) -> None:
        """Writes summary.json, whose keys `amenable.summary.Summary` documents."""
        write_json(self.summary, summary.model_dump(mode="json"))

    def read_summary(self) -> Summary:
        """summary.json as it was written. Raises RunProblem where there is none or it cannot be read."""
        try:
            return Summary.model_validate_json(self.summary.read_bytes())
        except FileNotFoundError:
            raise RunProblem(
                f"{self.root} has no summary.json yet: the run has not come to its end.", "run/not-so-far"
            ) from None
        except ValueError:
            raise RunProblem(f"{self.summary} cannot be read as a summary.", "run/damaged") from None
