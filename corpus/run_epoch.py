"""Whether an attempt at a run is still the one that may write: what the run's lease says, read by whoever commits."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from corpus.problems import RunProblem
from corpus.storage import is_object_store, one_line, opened, without_options

_CLAIM = re.compile(r"epoch-(\d{6,})-[0-9a-f]+\.json")
_AGAIN = "the same command continues"


@dataclass(frozen=True)
class RunEpoch:
    """One holder of a run's lease: where the lease is and the holder's number. Plain, so that it can go to other
    processes, which commit for the holder.

    `lease` is the lease's file (absolute), or, in an object store, the address of the directory of its claims, which
    are objects named by `claim_name`.
    """

    lease: Path | str
    number: int

    def check(self) -> None:
        """Returns while the lease is of this number. To be called before every commit.

        Raises RunProblem once another attempt has taken it over, or where it cannot be read.
        """
        in_store = is_object_store(self.lease)
        number, holder = self._claim() if in_store else self._file()
        if number != self.number:
            who = "process {pid} on {host} at {started}".format_map(holder)
            run = os.path.dirname(self._named())
            raise RunProblem(
                f"{run} was taken over by {who}; this older attempt stops here and writes nothing more.", "lease/lost"
            )

    def _file(self) -> tuple[int, dict[str, Any]]:
        try:
            return _number_and_holder(Path(self.lease).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise self._gone() from None
        except OSError as error:
            raise RunProblem(
                f"{self.lease} cannot be read ({error}), so the run stops here; {_AGAIN}.", "lease/unusable"
            ) from None
        except (ValueError, TypeError, KeyError):
            raise self._no_lease() from None

    def _claim(self) -> tuple[int, dict[str, Any]]:
        try:
            filesystem, claims = claims_in(str(self.lease))
            if not claims:
                raise self._gone()
            with filesystem.open_input_stream(claims[-1].path, compression=None) as stream:
                return _number_and_holder(stream.read())
        except OSError as error:
            told = f"{self._named()} cannot be read ({one_line(error)}), so the run stops here; {_AGAIN}."
            raise RunProblem(told, "lease/unusable") from error
        except (ValueError, TypeError, KeyError):
            raise self._no_lease() from None

    def _named(self) -> str:
        lease = str(self.lease)
        return without_options(lease) if is_object_store(lease) else lease

    def _gone(self) -> RunProblem:
        return RunProblem(
            f"{self._named()} is gone: someone removed it while the run was writing, so it stops here.", "lease/lost"
        )

    def _no_lease(self) -> RunProblem:
        return RunProblem(
            f"{self._named()} is no lease of a run any more, so the run stops here; remove it.", "lease/lost"
        )


def claim_name(number: int, token: str) -> str:
    """The name of the object by which a holder claims epoch `number`; `token` is hexadecimal, and the holder's own."""
    return f"epoch-{number:06d}-{token}.json"


def epoch_of(claim: str) -> int:
    """The number in the name of a claim."""
    match = _CLAIM.fullmatch(claim)
    assert match is not None, claim
    return int(match[1])


def claims_in(address: str) -> tuple[fs.FileSystem, list[fs.FileInfo]]:
    """The file system of `address` and the claims there, by growing epoch. Raises OSError where it cannot be listed."""
    filesystem, inner = opened(address)
    listed = filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
    found = [each for each in listed if each.type == fs.FileType.File and _CLAIM.fullmatch(each.base_name)]
    return filesystem, sorted(found, key=lambda each: (epoch_of(each.base_name), each.base_name))


def _number_and_holder(text: str | bytes) -> tuple[int, dict[str, Any]]:
    holder = json.loads(text)
    "{pid} {host} {started}".format_map(holder)
    return holder["epoch"], holder
