"""Finished slices of a sampling that is under way, kept so that a later command samples only what is missing.

They are Parquet in the stage's directory until it completes. Their names count the slices of one model's samples; the
stage's identity holds the seeds, so that a slice that is there is the slice that would be made again.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from corpus.problems import UsageProblem
from corpus.schemas import read_table, write_table

SAMPLES_PARTIAL = "samples-partial"


@dataclass(frozen=True)
class KeptSamples:
    """The slices of the samples called `label` (a name of one path component) of the stage in `directory`."""

    directory: Path
    label: str

    def read(self, number: int, prompts: pa.Table, samples: int) -> pa.Table | None:
        """Slice `number` where it holds `samples` responses to each of `prompts`, in their order; else None.

        A slice of other prompts is left by a command that cut them differently, as the engines' sizes tell it to.
        """
        try:
            table = read_table(self._path(number), "samples")
        except UsageProblem:  # there is none, or it is damaged: it is sampled again
            return None
        wanted = [(prompt, sample) for prompt in prompts["prompt_id"].to_pylist() for sample in range(samples)]
        found = zip(table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
        return table if list(found) == wanted else None

    def keep(self, number: int, table: pa.Table) -> None:
        """Writes slice `number`, whole or not at all. Raises RunProblem where the disk refuses it."""
        write_table(table, self._path(number), "samples")

    def _path(self, number: int) -> Path:
        return self.directory / SAMPLES_PARTIAL / f"{self.label}-{number:05d}.parquet"
