"""What a run reads from outside its directory, by the hash of its contents, or by its commit on the Hugging Face Hub: a
name alone would hide a change."""

import hashlib
import importlib.util
import sys
from pathlib import Path

from actors.rewards import RewardSettings
from corpus.problems import UsageProblem

PADDED_BASE = "base-with-pad"
"""Where the data stage writes a base model that lacks a row for PAD with one: every later model has it, and so must the
engines that are given their weights."""


COMMIT = "commit on the Hub"
"""By this name what is read of a model on the Hub stands among the hashes of files."""


def whereabouts(directory_or_name: str) -> str:
    """A local model directory by its absolute path, since learners work in directories of their own; else the name."""
    path = Path(directory_or_name).expanduser()
    return str(path.absolute()) if path.is_dir() else directory_or_name


def directory_hashes(directory: str) -> dict[str, str]:
    """SHA-256 of every file of a local model directory, by name; nothing for a name on the Hub."""
    path = Path(directory)
    return {file.name: _sha256(file) for file in sorted(path.iterdir()) if file.is_file()} if path.is_dir() else {}


def model_hashes(directory_or_name: str) -> dict[str, str]:
    """What tells one content of a model from another: `directory_hashes`, or COMMIT with the commit of a name on the
    Hub; nothing where neither the Hub nor its cache tells one."""
    if Path(directory_or_name).is_dir():
        return directory_hashes(directory_or_name)
    from corpus.hub import model_commit

    commit = model_commit(directory_or_name)
    return {} if commit is None else {COMMIT: commit}


def reward_hashes(reward: RewardSettings) -> dict[str, str]:
    """The same of what makes a reward: a model, or the module that holds a function (not what it imports)."""
    if reward.kind == "huggingface" and reward.model is not None:
        return model_hashes(reward.model)
    if reward.kind == "function" and reward.function is not None:
        file = _module_file(reward.function.partition(":")[0])
        return {} if file is None else {file.name: _sha256(file)}
    return {}


def _module_file(module: str) -> Path | None:
    if "" not in sys.path:
        sys.path.append("")  # as the scorer does: an installed command does not look in the working directory by itself
    try:
        found = importlib.util.find_spec(module)
    except (Exception, SystemExit):  # noqa: BLE001 - it imports the packages above: check_reward has told, or will
        return None
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageProblem(f"{path}: cannot be read ({error.strerror}).", "storage/read") from None
