"""What a run reads from outside its directory, by the hash of its contents: a name alone would hide a change."""

import hashlib
import importlib.util
import sys
from pathlib import Path

from actors.rewards import RewardSettings


def directory_hashes(directory: str) -> dict[str, str]:
    """SHA-256 of every file of a local model directory, by name; nothing for a name on the Hub."""
    path = Path(directory)
    return {file.name: _sha256(file) for file in sorted(path.iterdir()) if file.is_file()} if path.is_dir() else {}


def reward_hashes(reward: RewardSettings) -> dict[str, str]:
    """The same of what makes a reward: a local model, or the module that holds a function (not what it imports)."""
    if reward.kind == "huggingface" and reward.model is not None:
        return directory_hashes(reward.model)
    if reward.kind == "function" and reward.function is not None:
        file = _module_file(reward.function.partition(":")[0])
        return {} if file is None else {file.name: _sha256(file)}
    return {}


def _module_file(module: str) -> Path | None:
    if "" not in sys.path:
        sys.path.append("")  # as the scorer does: an installed command does not look in the working directory by itself
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None  # told by check_reward
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
