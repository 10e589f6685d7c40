"""A directory that an object store keeps, and its working copy on a local disk.

Programs read and write the working copy; `push` makes the store as the copy is, `pull` the copy as the store is. The
store is the truth: what has not been pushed is not there for anyone else. Which files are the same on both sides is
remembered in the copy (`.stored.json`), by sizes and times of both sides, so that neither is read to compare them.
Stores stamp objects to the second: two machines that write one object, with as many bytes, within the same second are
not told apart. A run's lease passes from one to the other by new processes' requests, which takes longer than that.
"""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from corpus.problems import RunProblem
from corpus.storage import below, fetch, one_line, opened, send, without_options

INDEX = ".stored.json"
AT_ONCE = 8
"""Files that travel at the same time. House default."""

Known = dict[str, list[int]]
"""By path: bytes and modification time (ns) of the local file, then bytes and time (ns) of the object."""


@dataclass(frozen=True)
class StoredDirectory:
    """The directory at `address`, with its working copy `root` (absolute). Plain, so that it can go to other processes.

    Files and directories named in `local` belong to the working copy, or to the store, alone. A file named in `commits`
    says that others are whole: it arrives after them, and is gone before any of them changes.
    """

    address: str
    root: Path
    local: frozenset[str] = frozenset()
    commits: frozenset[str] = frozenset()

    def address_of(self, path: Path) -> str:
        """The address of what lies at `path` in the working copy."""
        return below(self.address, path.relative_to(self.root).as_posix())

    def holds(self, name: str) -> bool:
        """Whether the store has the file or directory `name`. Raises RunProblem where it does not say."""
        filesystem, inner = self._store()
        try:
            return filesystem.get_file_info(f"{inner}/{name}").type != fs.FileType.NotFound
        except OSError as error:
            raise self._problem("cannot be reached", error) from error

    def is_empty(self) -> bool:
        """Whether the store has nothing there. Raises RunProblem where it does not say."""
        return not self._stored(everything=True)

    def push(self, may_commit: Callable[[], None] = lambda: None) -> int:
        """Makes the store as the working copy is; returns how many files went there.

        `may_commit` raises where this process may not write any more; it is called before anything is changed, and
        again before any of `commits` is written. Raises RunProblem where the store refuses.
        """
        known, found = self._known(), self._found()
        changed = [path for path, stat in found.items() if known.get(path, [])[:2] != stat]
        gone = [path for path in known if path not in found]
        if not changed and not gone:
            return 0
        commits = [path for path in changed if self._is_commit(path)]
        may_commit()
        try:
            self._remove([path for path in (*gone, *commits) if self._is_commit(path) and path in known], known)
            self._send([path for path in changed if path not in commits], found, known)
            if commits:
                may_commit()
                self._send(commits, found, known)
            self._remove([path for path in gone if path in known], known)
        except OSError as error:
            raise self._problem("could not be written", error) from error
        finally:
            self._remember(known)
        return len(changed)

    def pull(self, wanted: Callable[[str], bool] = lambda path: True) -> int:
        """Makes the working copy as the store is, for the paths that are `wanted`; returns how many files came.

        What the copy has and the store has not is removed. Nobody else may work in the copy meanwhile. Raises
        RunProblem where the store cannot be read, or the disk takes no more.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        stored = {path: stat for path, stat in self._stored().items() if wanted(path)}
        known, found = self._known(), self._found()
        missing = [path for path, stat in stored.items() if known.get(path) != [*found.get(path, []), *stat]]
        try:
            # Commits first out and last in here too: a copy that was interrupted in this is not taken for a whole one.
            for path in sorted({*found, *missing} - ({*stored} - {*missing}), key=self._is_commit, reverse=True):
                (self.root / path).unlink(missing_ok=True)
                known.pop(path, None)
            for group in (False, True):
                self._fetch([path for path in missing if self._is_commit(path) is group], stored, known)
        except OSError as error:
            raise self._problem(f"could not be brought to {self.root}", error) from error
        finally:
            self._remember({path: stats for path, stats in known.items() if path in stored})
        self._remove_empty_directories()
        return len(missing)

    # what is there ---------------------------------------------------------------------------------------------------

    def _store(self) -> tuple[fs.FileSystem, str]:
        return opened(self.address)

    def _is_shared(self, path: str) -> bool:
        """Whether a file belongs to both sides; one that is being written (`.partial`) does not."""
        parts = path.split("/")
        return not (path == INDEX or self.local.intersection(parts) or any(part.endswith(".partial") for part in parts))

    def _is_commit(self, path: str) -> bool:
        return path.rpartition("/")[2] in self.commits

    def _found(self) -> dict[str, list[int]]:
        """Bytes and modification time (ns) of every file of the working copy, by path."""
        found = {}
        for directory, _, names in os.walk(self.root):
            for name in names:
                file = Path(directory) / name
                path = file.relative_to(self.root).as_posix()
                if self._is_shared(path):
                    with suppress(FileNotFoundError):  # gone meanwhile
                        stat = file.stat()
                        found[path] = [stat.st_size, stat.st_mtime_ns]
        return dict(sorted(found.items()))

    def _stored(self, everything: bool = False) -> dict[str, list[int]]:
        """The same of the objects."""
        filesystem, inner = self._store()
        try:
            listed = filesystem.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
        except OSError as error:
            raise self._problem("cannot be listed", error) from error
        files = {each.path[len(inner) + 1 :]: _stat(each) for each in listed if each.type == fs.FileType.File}
        return {path: stat for path, stat in sorted(files.items()) if everything or self._is_shared(path)}

    def _known(self) -> Known:
        try:
            content = json.loads((self.root / INDEX).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # the copy is new, or its index was cut short: everything travels
            return {}
        known = content.get("files") if isinstance(content, dict) else None
        return known if isinstance(known, dict) and content.get("address") == self.address else {}

    def _remember(self, known: Known) -> None:
        partial_index = self.root / f"{INDEX}.{os.getpid()}.partial"
        partial_index.write_text(json.dumps({"schema_version": 1, "address": self.address, "files": known}))
        partial_index.replace(self.root / INDEX)

    # what travels ----------------------------------------------------------------------------------------------------

    def _send(self, paths: list[str], found: dict[str, list[int]], known: Known) -> None:
        filesystem, inner = self._store()

        def one(path: str) -> None:
            if not (self.root / path).exists():  # gone meanwhile: the next push tells the store
                return
            sent = send(self.root / path, filesystem, f"{inner}/{path}")
            arrived = _stat(filesystem.get_file_info(f"{inner}/{path}"))
            if arrived[0] != sent:
                raise OSError(f"{path} arrived with {arrived[0]} bytes, not {sent}")
            known[path] = [*found[path], *arrived]

        _all(one, paths)

    def _fetch(self, paths: list[str], stored: dict[str, list[int]], known: Known) -> None:
        filesystem, inner = self._store()

        def one(path: str) -> None:
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            arriving = target.with_name(f"{target.name}.partial")
            fetch(filesystem, f"{inner}/{path}", arriving)
            arriving.replace(target)
            stat = target.stat()
            known[path] = [stat.st_size, stat.st_mtime_ns, *stored[path]]

        _all(one, paths)

    def _remove(self, paths: list[str], known: Known) -> None:
        filesystem, inner = self._store()

        def one(path: str) -> None:
            with suppress(FileNotFoundError):
                filesystem.delete_file(f"{inner}/{path}")
            known.pop(path, None)

        _all(one, paths)

    def _remove_empty_directories(self) -> None:
        for directory, _, _ in os.walk(self.root, topdown=False):
            if Path(directory) != self.root and not os.listdir(directory):
                os.rmdir(directory)

    def _problem(self, what: str, error: OSError) -> RunProblem:
        place = without_options(self.address)
        return RunProblem(
            f"{place} {what} ({one_line(error)}); once it can, the same command continues.", "storage/unreachable"
        )


def _stat(info: Any) -> list[int]:
    return [info.size or 0, info.mtime_ns or 0]


def _all(one: Callable[[str], None], paths: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="store") as pool:
        list(pool.map(one, paths))  # raises what one of them raised
