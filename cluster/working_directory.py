"""What travels with a job: the files of its working directory, whether they fit, and whether the recipe is among them.

Ray packs the directory without compression and sends it through the dashboard, which takes no body of 100 MiB or more
(`DASHBOARD_CLIENT_MAX_SIZE`; it answers with a traceback). What is left out says Ray itself: its own list, `excludes`,
and the .gitignore and .rayignore of each directory, in gitignore's syntax. Ray's own functions are asked here, so that
what is checked is what is sent.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from corpus.problems import UsageProblem

EXCLUDES = (
    "runs/",
    "wandb/",
    "build/",
    "dist/",
    "*.egg-info/",
    "node_modules/",
    ".*_cache/",
    ".cache/",
    ".hypothesis/",
    ".ray/",
    ".aws/",
    ".ssh/",
    ".kube/",
    ".netrc",
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
)
"""Left out of every upload, in gitignore's syntax: what a run makes, what tools keep, and where secrets lie. Ray leaves
out .git, .venv, venv and __pycache__ by itself. House default."""

SHOWN = 5
"""Files, the largest first, that are named where a directory does not fit."""

_ENTRY_BYTES = 30 + 46
_END_BYTES = 22
"""Of a zip archive (PKWARE's APPNOTE, 4.3): local and central header of an entry without its name, which stands in
both, and the end of the archive."""


@dataclass(frozen=True)
class PackedFile:
    """A file, or an empty directory (its name ends with /), as it lies in the package."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class WorkingDirectory:
    """What of a directory travels, and what Ray is told to leave out."""

    root: Path
    files: tuple[PackedFile, ...]
    excludes: tuple[str, ...]

    @property
    def package_bytes(self) -> int:
        """Size of the package in bytes."""
        return packed_bytes(self.files)


def packed_bytes(files: Iterable[PackedFile]) -> int:
    """Size in bytes of a zip archive that holds `files` without compression."""
    return _END_BYTES + sum(_ENTRY_BYTES + 2 * len(file.name.encode()) + file.size_bytes for file in files)


def upload_limit_bytes() -> int:
    """The size of a package, in bytes, from which on Ray's dashboard refuses it."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    return DASHBOARD_CLIENT_MAX_SIZE


def travelling(root: Path, excludes: Sequence[str] = ()) -> WorkingDirectory:
    """What of the directory `root` (absolute) Ray would send, where it is told to leave out `EXCLUDES` and `excludes`.

    Raises UsageProblem where the directory, or something in it, cannot be read.
    """
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    told = (*EXCLUDES, *excludes)
    found: list[PackedFile] = []

    def note(path: Path) -> None:
        is_empty_directory = path.is_dir() and next(path.iterdir(), None) is None
        if is_empty_directory or path.is_file():
            name = path.relative_to(root).as_posix() + ("/" if is_empty_directory else "")
            found.append(PackedFile(name, 0 if is_empty_directory else path.stat().st_size))

    if not root.is_dir():
        raise UsageProblem(
            f"There is no directory {root}; name the one that is to travel with --working-dir DIR.",
            "job/working-directory",
        )
    quiet = logging.getLogger(f"{__name__}.quiet")
    quiet.setLevel(logging.CRITICAL)  # Ray would say for every .gitignore that it heeds it
    left_out = _get_excludes(root, [*get_runtime_env_default_excludes(), *told])
    heeds_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    try:
        _dir_travel(root, [left_out], note, include_gitignore=heeds_gitignore, logger=quiet)
    except OSError as error:
        raise UsageProblem(
            f"{error.filename}: it cannot be read ({error.strerror}), and would travel with the job; leave it out with "
            "--exclude PATTERN.",
            "job/working-directory",
        ) from None
    return WorkingDirectory(root, tuple(sorted(found, key=lambda file: file.name)), told)


def check_fits(directory: WorkingDirectory, limit_bytes: int) -> None:
    """Raises UsageProblem, which names the largest files, where the package would not be smaller than `limit_bytes`."""
    if directory.package_bytes < limit_bytes:
        return
    largest = sorted(directory.files, key=lambda file: -file.size_bytes)[:SHOWN]
    named = ", ".join(f"{file.name} ({_mib(file.size_bytes)})" for file in largest)
    raise UsageProblem(
        f"{directory.root} has {_mib(directory.package_bytes)} to send, and Ray takes less than {_mib(limit_bytes)}; "
        f"leave out what the job does not read with --exclude PATTERN or in .gitignore. The largest: {named}.",
        "job/too-large",
    )


def check_has(directory: WorkingDirectory, wanted: Iterable[Path]) -> None:
    """Raises UsageProblem where one of the files `wanted` (the recipe, and those that it extends) would not travel."""
    names = {file.name for file in directory.files}
    for path in wanted:
        try:
            name = path.resolve().relative_to(directory.root.resolve()).as_posix()
        except ValueError:
            raise UsageProblem(
                f"{path} is outside {directory.root}, so the job would not have it; submit from a directory that holds "
                "it, or name that with --working-dir DIR.",
                "job/working-directory",
            ) from None
        if name not in names:
            raise UsageProblem(
                f"{name} would be left out of what is sent, by .gitignore, .rayignore or --exclude, and the job needs "
                "it; put it elsewhere, or leave it in.",
                "job/working-directory",
            )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
