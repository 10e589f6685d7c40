"""Whether an attempt at a run is still the one that may write: what run.lease says, read by whoever commits."""

import json
from dataclasses import dataclass
from pathlib import Path

from corpus.problems import RunProblem


@dataclass(frozen=True)
class RunEpoch:
    """One holder of a run's lease: the file (absolute) and the holder's number. Plain, so that it can go to other
    processes, which commit for the holder."""

    lease: Path
    number: int

    def check(self) -> None:
        """Returns while the lease is of this number. To be called before every commit.

        Raises RunProblem once another attempt has taken it over, or where it cannot be read.
        """
        again = "the same command continues"
        try:
            holder = json.loads(self.lease.read_text(encoding="utf-8"))
            number, who = holder["epoch"], "process {pid} on {host} at {started}".format_map(holder)
        except FileNotFoundError:
            raise RunProblem(
                f"{self.lease} is gone: someone removed it while the run was writing, so it stops here."
            ) from None
        except OSError as error:
            raise RunProblem(f"{self.lease} cannot be read ({error}), so the run stops here; {again}.") from None
        except (ValueError, TypeError, KeyError):
            raise RunProblem(f"{self.lease} is no lease of a run any more, so the run stops here; remove it.") from None
        if number != self.number:
            raise RunProblem(
                f"{self.lease.parent} was taken over by {who}; this older attempt stops here and writes nothing more."
            )
