"""Model names of a service, and where in the run's directory, or its mirror, their weights lie.

policy: the newest weights (published ones while PPO trains, its export once it is done); policy-ema: PPO's moving
average; sft: the selected epoch; reference: what PPO started from, frozen; base; policy@N: one version.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from actors.published import PINNED_NAME, PUBLISHED, PublishedSnapshot, pinned_of, published
from corpus.problems import RunProblem

POLICY = "policy"
TITLES = {
    POLICY: "the policy as it is now",
    "policy-ema": "the moving average of PPO's weights",
    "sft": "the supervised baseline",
    "reference": "what PPO started from, frozen",
    "base": "the base model",
}
"""The names that do not mean one version, with what they are."""

ROUND = re.compile(r"round-\d{2}")
"""Name of a round's directory."""

log = logging.getLogger(__name__)


class Fetch(Protocol):
    """What brings a run's files here."""

    def __call__(self, path: Path, sha256: str, damaged: bool = False) -> None:
        """Has a file of a run be on this machine, with this sha256 (hex); `damaged` says that what is here was found to
        be another. Raises RunProblem where it cannot."""
        ...


@dataclass(frozen=True)
class Weights:
    """What a name means now: a version label that no other weights of the run have, and either a Hugging Face
    directory with the sha256 of its files, or a published snapshot."""

    version: str
    directory: Path | None = None
    hashes: tuple[tuple[str, str], ...] = ()
    """File name in the directory, sha256 (hex), for every file of weights; empty where nobody has recorded them."""
    snapshot: PublishedSnapshot | None = None
    fetch: Fetch | None = field(default=None, compare=False, repr=False)
    """What brings the files here where a store keeps them; None where they are here."""

    def bring(self) -> None:
        """Has the files be on this machine. Raises RunProblem where they cannot be brought here."""
        if self.fetch is not None:
            for path, expected in self._recorded():
                self.fetch(path, expected)

    def files(self) -> list[Path]:
        """The safetensors files."""
        if self.snapshot is not None:
            return [self.snapshot.weights]
        assert self.directory is not None
        return sorted(self.directory.glob("*.safetensors"))

    def check(self) -> None:
        """Brings the files here where they are not, and once more where the disk has damaged them since. Raises
        RunProblem where one is not the one that was recorded."""
        self.bring()
        try:
            self._verify()
        except RunProblem as problem:
            if self.fetch is None:
                raise
            log.warning("%s It is fetched anew.", problem)
            for path, expected in self._recorded():
                self.fetch(path, expected, damaged=True)
            try:
                self._verify()
            except RunProblem as again:
                raise RunProblem(
                    f"{again} It was fetched a moment ago: look at the disk of this machine.", again.code
                ) from None

    def _recorded(self) -> list[tuple[Path, str]]:
        """The files of weights with their sha256 (hex)."""
        if self.snapshot is not None:
            return [(self.snapshot.weights, self.snapshot.sha256)]
        assert self.directory is not None
        return [(self.directory / name, expected) for name, expected in self.hashes]

    def _verify(self) -> None:
        """Raises RunProblem where a file is not the one that was recorded."""
        if self.snapshot is not None:
            self.snapshot.check()
            return
        for path, expected in self._recorded():
            try:
                with open(path, "rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise RunProblem(f"{path} cannot be read ({error}).", "run/damaged") from error
            if found != expected:
                raise RunProblem(f"{path} is damaged: it is not the file that its stage wrote.", "run/damaged")


class Names:
    """The names of the run in `run` (a local directory). Every method looks at the files as they are now.

    Weights may be missing there: `fetch` brings them when they are asked for.
    """

    def __init__(self, run: Path, fetch: Fetch | None = None) -> None:
        self._run, self._fetch = run, fetch

    @property
    def round(self) -> Path:
        """The newest round's directory, whether anything is in it or not."""
        found = sorted(place for place in self._run.glob("round-*") if ROUND.fullmatch(place.name))
        return found[-1] if found else self._run / "round-01"

    @property
    def published(self) -> Path:
        """The directory of published snapshots."""
        return self._run / PUBLISHED

    def find(self, name: str) -> Weights | None:
        """What `name` means now; None where the run has no such model (yet). Any text may be given."""
        if PINNED_NAME.fullmatch(name):
            return self._version(name)
        if name not in TITLES:
            return None
        if name == POLICY:
            return self._export(self.round / "ppo", "policy") or self._newest_published()
        if name == "policy-ema":
            return self._export(self.round / "ppo", "ema")
        if name == "sft":
            return self._sft()
        if name == "reference":
            return self._export(self.round / "ppo-init", "export")
        return self._base()

    def all(self) -> dict[str, Weights]:
        """Every name that means something now, versions last and newest first."""
        found = {name: self.find(name) for name in TITLES}
        for one in reversed(published(self.published)):
            found.setdefault(f"policy@{one.version[1]}", self._published(one))
        return {name: weights for name, weights in found.items() if weights is not None}

    def skeleton(self) -> Path:
        """A Hugging Face directory with config and tokenizer of the run's language models. Raises RunProblem where the
        run has made no model yet."""
        found = self._language_model().directory
        assert found is not None
        return found

    def whole_skeleton(self) -> Path:
        """The same, with its weights. Raises RunProblem too where they are damaged or cannot be brought here."""
        self._language_model().check()
        return self.skeleton()

    def _language_model(self) -> Weights:
        for name in ("reference", "sft", "base"):
            weights = self.find(name)
            if weights is not None and weights.directory is not None:
                return weights
        raise RunProblem(f"{self._run} has no model yet that could be served: its SFT is not done.", "serving/no-model")

    def reward_model(self) -> Path | None:
        """The directory of the run's reward model; None where it is not trained yet."""
        weights = self._export(self.round / "rm", "export")
        return weights.directory if weights is not None else None

    def whole_reward_model(self) -> Path:
        """The same, with its weights. Raises RunProblem where there is none, or they are damaged or cannot be brought
        here."""
        weights = self._export(self.round / "rm", "export")
        if weights is None or weights.directory is None:
            raise RunProblem(f"{self._run} has no reward model: its rm is not done.", "serving/no-model")
        weights.check()
        return weights.directory

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe. Raises RunProblem where it cannot be read."""
        path = self._run / "recipe.yaml"
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RunProblem(f"{path} cannot be read ({error}).", "run/damaged") from error
        if not isinstance(content, dict):
            raise RunProblem(f"{path} is no recipe.", "run/damaged")
        return content

    def _version(self, name: str) -> Weights | None:
        found = {one.version: one for one in published(self.published)}
        version = pinned_of(list(found), name)
        return None if version is None else self._published(found[version])

    def _newest_published(self) -> Weights | None:
        found = published(self.published)
        return self._published(found[-1]) if found else None

    def _published(self, one: PublishedSnapshot) -> Weights:
        return Weights(one.label, snapshot=one, fetch=self._fetch)

    def _sft(self) -> Weights | None:
        try:
            selection = json.loads((self.round / "select-sft" / "selection.json").read_text(encoding="utf-8"))
            return self._export(self._run / "sft", str(selection["selected"]))
        except (OSError, ValueError, KeyError):
            pass
        exports = _record(self._run / "sft").get("values", {}).get("exports", [])
        if not exports:
            return None
        best = min(exports, key=lambda each: each.get("valid_loss", float("inf")))
        return self._export(self._run / "sft", best["directory"])

    def _base(self) -> Weights | None:
        own = self._export(self._run / "base", "export") or self._export(self._run / "data", "base-with-pad")
        if own is not None:
            return own
        given = self.recipe().get("model", {}).get("base")
        if given is None or not Path(given).is_absolute() or not Path(given).is_dir():
            return None  # a name on the Hub is not fetched for a service
        return Weights(f"base-{hashlib.sha256(str(given).encode()).hexdigest()[:12]}", Path(given))

    def _export(self, stage: Path, name: str) -> Weights | None:
        """The directory `name` that a stage has left; None before the stage is done."""
        files = _record(stage).get("files", {})
        hashes = tuple(
            (file.removeprefix(f"{name}/"), record["sha256"])
            for file, record in sorted(files.items())
            if file.startswith(f"{name}/") and file.endswith(".safetensors")
        )
        if not hashes or not (stage / name).is_dir():
            return None
        digest = hashlib.sha256("".join(found for _, found in hashes).encode()).hexdigest()
        return Weights(f"{name}-{digest[:12]}", stage / name, hashes, fetch=self._fetch)


def _record(stage: Path) -> dict[str, Any]:
    """stage.json of a stage that is done; empty before."""
    try:
        found = json.loads((stage / "stage.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
