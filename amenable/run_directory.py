"""Where everything of a run lies (docs/architecture.md holds the map), and the files that say what the run was."""

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from amenable.json_files import write_json, write_text
from amenable.lineage import lineage
from amenable.recipe_loading import resolved
from amenable.run_lease import LEASE_FILE, LOCK_FILE, RunLease
from amenable.summary import Summary
from corpus.problems import RunProblem, UsageProblem

_MARKS_OF_A_RUN = {"recipe.yaml", "lineage.json", LEASE_FILE, LOCK_FILE}


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
    """The directory of one run. `root` is absolute, because Ray Train's workers change their working directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = Path(os.path.abspath(os.path.expanduser(path)))

    @classmethod
    def find(cls, run: str) -> "RunDirectory":
        """The existing run meant by `run`: a path, or the name of a run in ./runs. Raises UsageProblem without one."""
        if not run:
            raise UsageProblem("The name of the run is empty; name the directory of a run, such as runs/demo.")
        places = [Path(run)]
        if os.sep not in run and run not in (".", ".."):
            places.append(Path("runs") / run)
        for place in places:
            try:
                if place.is_dir() and cls(place).is_a_run():
                    return cls(place)
            except OSError as error:  # a directory that may not be looked into, a name that is too long
                raise UsageProblem(f"{place}: the run cannot be reached ({error.strerror}).") from None
        looked = " or ".join(str(place) for place in places)
        raise UsageProblem(f"There is no run in {looked}; name the directory of a run, such as runs/demo.")

    def is_a_run(self) -> bool:
        """True where the directory bears the marks of a run."""
        return any((self.root / mark).exists() for mark in _MARKS_OF_A_RUN)

    def create(self) -> None:
        """Makes the directory. Raises UsageProblem where it holds files that are not a run's."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            foreign = not self.is_a_run() and any(self.root.iterdir())
        except (FileExistsError, NotADirectoryError):
            raise UsageProblem(f"{self.root} is a file; give the run a directory with --run.") from None
        except OSError as error:
            raise UsageProblem(f"The run directory {self.root} cannot be made ({error.strerror}).") from None
        if foreign:
            raise UsageProblem(
                f"{self.root} holds files that are not a run's; give the run a new or empty directory with --run."
            )

    def lease(self) -> RunLease:
        """The right to write here, as a context manager; a live holder refuses a second (see RunLease)."""
        return RunLease(self.root)

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

    def write_lineage(self, run: str, data_hashes: dict[str, str]) -> None:
        """Writes lineage.json anew from the stages that are complete; when the run was created is kept."""
        write_json(self.lineage, lineage(self.root, run, data_hashes))

    def write_summary(self, summary: Summary) -> None:
        """Writes summary.json, whose keys `amenable.summary.Summary` documents."""
        write_json(self.summary, summary.model_dump(mode="json"))

    def read_summary(self) -> Summary:
        """summary.json as it was written. Raises RunProblem where there is none or it cannot be read."""
        try:
            return Summary.model_validate_json(self.summary.read_bytes())
        except FileNotFoundError:
            raise RunProblem(f"{self.root} has no summary.json yet: the run has not come to its end.") from None
        except ValueError:
            raise RunProblem(f"{self.summary} cannot be read as a summary.") from None
