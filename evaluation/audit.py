"""Whether a run trained every slot exactly once on its committed lineage: proved from its files, update by update.

The committed lineage is what the records of the attempts say; what is committed of it is, in a stage that is done, all
of it, else what the newest checkpoint holds. Each update has one file of episodes there, its owner's; the files of
attempts that were rolled back are counted, and lie beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.attempts import DIRECTORY, TRAINED, SavedProgress, Segment, committed_lineage, is_on_lineage, owner_of
from corpus.problems import RunProblem, UsageProblem
from evaluation.audit_files import EpisodeFile, SavedStream, StageFiles, ppo_stages, read_episodes

SHOWN = 8
"""Slots, or updates, that a sentence names."""


@dataclass
class AttemptTally:
    """What became of the slots of one attempt. None where no count was kept."""

    attempt: int
    began_with: int
    """Updates trained in the checkpoint that it began from."""
    ended_with: int | None
    """Updates that are of the committed lineage when it ended; None where it was rolled back whole."""
    admitted: int | None
    generated: int | None
    regenerated: int | None
    discarded: int | None
    """Generated in this attempt and rolled back."""
    trained: int = 0
    """On the committed lineage."""
    rolled_back: int = 0
    """Trained by this attempt, and trained again by a later one in their place."""
    duplicated: int = 0
    lost: int = 0


@dataclass
class StageAudit:
    """What an audit found of one PPO stage."""

    stage: str
    """Its directory inside the run: `round-01/ppo`."""
    finished: bool
    planned: int
    """Updates that the recipe asks for."""
    updates: int = 0
    """Updates that are committed."""
    uncommitted: int = 0
    """Updates after those, taken to be trained, that no checkpoint holds yet."""
    waiting: int = 0
    """Episodes that the newest checkpoint keeps for later updates."""
    attempts: list[AttemptTally] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is not as it must be, a sentence each, with file and slot."""

    @property
    def accepted(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """The audit in a sentence."""
        if not self.accepted:
            found = "1 thing is" if len(self.problems) == 1 else f"{len(self.problems)} things are"
            return f"{self.stage}: not accepted: {found} not as it must be."
        trained = sum(each.trained for each in self.attempts)
        so_far = "" if self.finished else f" so far, of {self.planned} (the stage is not finished)"
        return (
            f"{self.stage}: accepted: {trained} slots, each trained exactly once in {self.updates} updates{so_far}; "
            "none lost, none duplicated, no token older than allowed."
        )

    def as_json(self) -> dict[str, Any]:
        """The same as plain values, with `accepted` and `verdict`."""
        return {**asdict(self), "accepted": self.accepted, "verdict": self.verdict}


def audit_run(run_directory: Path, with_weights: bool = True) -> list[StageAudit]:
    """Audits every PPO stage of a run, finished or not; `with_weights` is for `StageFiles`.

    Raises RunProblem where there is none, and RunProblem or UsageProblem where what says what the stage was (its record
    or recipe, its attempts) cannot be read; all else that is wrong is among the problems of the answer.
    """
    return [
        audit_stage(files, files.directory.relative_to(run_directory).as_posix())
        for files in ppo_stages(run_directory, with_weights)
    ]


def audit_stage(files: StageFiles, name: str) -> StageAudit:
    """Audits one PPO stage, which the answer calls `name`."""
    found = StageAudit(name, files.finished is not None, files.plan.updates)
    episode_files = files.episode_files()
    if not files.attempts:
        if episode_files or files.finished:
            found.problems.append(
                f"{name} has no record of its attempts: who trained which update cannot be told (a release that kept "
                "none made it, or they were removed)."
            )
        return found
    try:
        segments = committed_lineage(files.attempts)
    except RunProblem as problem:
        found.problems.append(f"{name}: {problem}")
        return found
    return _Audit(files, found, segments, episode_files).run()


class _Audit:
    def __init__(
        self, files: StageFiles, found: StageAudit, segments: list[Segment], episode_files: list[EpisodeFile]
    ) -> None:
        self.files, self.found, self.segments = files, found, segments
        self.plan, self.problems = files.plan, found.problems
        self.episode_files = {(file.update, file.attempt): file for file in episode_files}
        self.tallies = {each.number: self._tally(each.number, each.start) for each in files.attempts}
        found.attempts = list(self.tallies.values())
        self.trained_slots: set[int] = set()
        self.kept: Counter[int] = Counter()
        """By attempt: episodes that were generated in it and are of the committed lineage."""

    def _tally(self, attempt: int, start: int) -> AttemptTally:
        counts = self.files.counts.get(attempt, {})
        ends = [segment.end for segment in self.segments if segment.attempt == attempt]
        return AttemptTally(
            attempt,
            start,
            ended_with=ends[0] if ends else None,
            admitted=counts.get("admitted"),
            generated=counts.get("generated"),
            regenerated=counts.get("regenerated"),
            discarded=counts.get("discarded"),
        )

    def run(self) -> StageAudit:
        """Fills `found`."""
        saved = self.files.checkpoints()
        newest = saved[-1] if saved else None
        finished = self.files.finished
        self.found.updates = finished if finished is not None else newest.said.step if newest is not None else 0
        for each in self.tallies.values():
            if each.ended_with is None and self.segments[-1].attempt == each.attempt:
                each.ended_with = max(self.found.updates, each.began_with)
        self._refuse_strange_files()
        self._committed_updates()
        if finished is None:
            self._later_updates()
            if newest is not None:
                self._checkpoint(newest)
        else:
            self._last_checkpoint(finished)
        self.problems += [
            f"{name} is not as it was when the stage was finished." for name in self.files.changed_since_committed()
        ]
        self._metric_lines()
        self._balance()
        return self.found

    # files ---------------------------------------------------------------------------------------------------------

    def _refuse_strange_files(self) -> None:
        """Files that are nobody's work on the lineage must be of an attempt that can have trained that update."""
        for (update, number), file in self.episode_files.items():
            tally = self.tallies.get(number)
            if tally is None:
                self.problems.append(f"{file.path.name} is of attempt {number}, of which there is no record.")
            elif update <= tally.began_with:
                self.problems.append(
                    f"{file.path.name}: attempt {number} began with {tally.began_with} updates trained, so it has not "
                    f"trained update {update}."
                )
            elif not 1 <= update <= self.plan.updates:
                self.problems.append(f"{file.path.name}: the run has updates 1 to {self.plan.updates}.")
            elif owner_of(update, self.files.attempts) != number:
                table = self._read(file.path)
                tally.rolled_back += 0 if table is None else table.num_rows

    def _committed_updates(self) -> None:
        for update in range(1, self.found.updates + 1):
            owner = owner_of(update, self.files.attempts)
            assert owner is not None  # there are attempts, and the first began with nothing
            slots = self._slots(update)
            file = self.episode_files.get((update, owner))
            if file is None:
                self.problems.append(
                    f"update-{update:06d}-attempt-{owner}.parquet is missing: slots {slots[0]} to {slots[-1]}, which "
                    f"attempt {owner} trained in update {update}, are lost."
                )
                self.tallies[owner].lost += len(slots)
                continue
            table = self._read(file.path)
            if table is None:
                self.tallies[owner].lost += len(slots)
                continue
            self._file(file, table)

    def _later_updates(self) -> None:
        """What the newest attempt took to train after the newest checkpoint: as whole, but not committed yet."""
        newest = self.segments[-1].attempt
        update = self.found.updates + 1
        while file := self.episode_files.get((update, newest)):
            table = self._read(file.path)
            if table is None:
                return
            self._file(file, table, committed=False)
            self.found.uncommitted += 1
            update += 1

    def _read(self, path: Path) -> pa.Table | None:
        try:
            return read_episodes(path)
        except UsageProblem as problem:
            self.problems.append(str(problem))
            return None

    def _slots(self, update: int) -> range:
        return range((update - 1) * self.plan.batch_size, update * self.plan.batch_size)

    def _file(self, file: EpisodeFile, table: pa.Table, committed: bool = True) -> None:
        """The rows must be the slots of the update, each once, in order, and each what the slot asks for."""
        name, expected = file.path.name, self._slots(file.update)
        slots: list[int] = table["slot"].to_pylist()
        times = Counter(slots)
        missing = [slot for slot in expected if slot not in times]
        doubled = [slot for slot, count in times.items() if count > 1]
        foreign = [slot for slot in times if slot not in expected]
        if missing:
            self.problems.append(f"{name}: {_slots_are(missing)} missing.")
        for slot in doubled:
            self.problems.append(f"{name}: slot {slot} is there {times[slot]} times.")
        for slot in foreign:
            self.problems.append(
                f"{name}: slot {slot} does not belong to update {file.update}, which trains slots {expected[0]} to "
                f"{expected[-1]}."
            )
        if not (missing or doubled or foreign) and slots != list(expected):
            place = next(place for place, slot in enumerate(slots) if slot != expected[place])
            self.problems.append(
                f"{name}: the rows are not in the order of their slots: slot {slots[place]} stands where slot "
                f"{expected[place]} should."
            )
        self._rows(name, table, dict.fromkeys(expected, file.update), file.attempt)
        if not committed:
            return
        tally = self.tallies[file.attempt]
        tally.trained += len(slots)
        tally.lost += len(missing)
        for slot, generated_in in zip(slots, table["attempt"].to_pylist(), strict=True):
            again = slot in self.trained_slots
            tally.duplicated += again
            self.kept[generated_in] += not again
            self.trained_slots.add(slot)

    # rows ----------------------------------------------------------------------------------------------------------

    def _rows(self, name: str, table: pa.Table, updates: dict[int, int], holder: int) -> None:
        """Each row must be what its slot asks for, and fit for the update of `updates` that it trains in and for the
        attempt `holder`, which has it."""
        lineage = {segment.attempt for segment in self.segments}
        columns = ("slot", "round", "sample", "attempt", "prompt_id", "prompt_tokens", "version_spans")
        lengths = {
            column: [len(each) for each in table[column].to_pylist()]
            for column in ("response_tokens", "behaviour_logprobs", "reference_logprobs")
        }
        for row, episode in enumerate(table.select(columns).to_pylist()):
            slot = episode["slot"]
            if slot not in updates:
                continue  # told already
            tokens = lengths["response_tokens"][row]
            said = [
                *self._of_slot(episode),
                *(
                    f"has {counted[row]} {column} for {tokens} response_tokens"
                    for column, counted in lengths.items()
                    if counted[row] != tokens
                ),
                *self._of_spans(episode["version_spans"], tokens, updates[slot]),
            ]
            generated_in = episode["attempt"]
            if generated_in not in lineage:
                said.append(f"was generated in attempt {generated_in}, which was rolled back")
            elif generated_in > holder:
                said.append(f"was generated in attempt {generated_in}, after attempt {holder}, which has it, had ended")
            self.problems += [f"{name}: slot {slot} {each}." for each in said]

    def _of_slot(self, episode: dict[str, Any]) -> list[str]:
        said = []
        if (episode["round"], episode["sample"]) != (self.files.round_number, 0):
            said.append(f"is of round {episode['round']}, sample {episode['sample']}")
        if self.files.prompts is not None:
            prompt_id, tokens = self.files.prompts.of(episode["slot"])
            if episode["prompt_id"] != prompt_id:
                said.append(f"answers prompt {episode['prompt_id']}, but belongs to prompt {prompt_id}")
            elif episode["prompt_tokens"] != tokens:
                said.append(f"has other tokens than prompt {prompt_id}")
        return said

    def _of_spans(self, spans: Sequence[dict[str, int]], tokens: int, update: int) -> list[str]:
        """What is wrong with who wrote the tokens of an episode that trains in `update`."""
        said = []
        end = 0
        for span in spans:
            if span["start"] != end or span["end"] <= span["start"]:
                break
            end = span["end"]
        if not spans or end != tokens or end != spans[-1]["end"]:
            said.append(f"has version spans that do not cover its {tokens} response tokens one after another")
        oldest, newest = update - 1 - self.plan.max_staleness, update - 1
        for number, version in dict.fromkeys((span["attempt"], span["update"]) for span in spans):
            weights = f"has tokens of weights {number}.{version}"
            if version < oldest:
                said.append(f"{weights}, but update {update} allows none older than those of update {oldest}")
            elif version > newest:
                said.append(f"{weights}, which were not there yet when update {update} was trained")
            elif not is_on_lineage(number, version, self.segments):
                said.append(f"{weights}, which were rolled back")
        return said

    # checkpoints ---------------------------------------------------------------------------------------------------

    def _checkpoint(self, saved: SavedStream) -> None:
        """The newest checkpoint, from which the run goes on, must be of the lineage and agree with itself."""
        name, said, size = saved.path.name, saved.said, self.plan.batch_size
        if not self._is_of_the_lineage(name, said):
            return
        self._saved(name, said)
        updates = {slot: slot // size + 1 for slot in said.waiting}
        self._rows(f"{name}/episodes.parquet", saved.episodes, updates, said.attempt)
        self.found.waiting = len(said.waiting)
        self.kept.update(saved.episodes["attempt"].to_pylist())

    def _last_checkpoint(self, finished: int) -> None:
        """What the last checkpoint of a stage that is done said: the learner's own record, against which what the stage
        says of itself is held once no checkpoint is left."""
        name = f"{DIRECTORY}/{TRAINED}"
        try:
            said = self.files.trained()
        except RunProblem as problem:
            self.problems.append(str(problem))
            return
        if said is None:
            self.problems.append(
                f"{name} is missing: what the learner itself recorded as trained cannot be compared with the episodes "
                "(a release that kept no such file finished the stage, or the file was removed)."
            )
            return
        if said.step != finished:
            self.problems.append(f"{name}: it is of {said.step} updates, but stage.json of {finished}.")
        if finished < self.plan.updates and not said.stopped_by:
            self.problems.append(
                f"{name}: training ended after {finished} of {self.plan.updates} updates, and nothing is said to have "
                "ended it."
            )
        if self._is_of_the_lineage(name, said):
            self._saved(name, said)

    def _is_of_the_lineage(self, name: str, said: SavedProgress) -> bool:
        if is_on_lineage(said.attempt, said.step, self.segments):
            return True
        self.problems.append(
            f"{name}: it is of attempt {said.attempt} with {said.step} updates, which was rolled back."
        )
        return False

    def _saved(self, name: str, said: SavedProgress) -> None:
        """The updates of a checkpoint must be those of its ledger and of its optimisers' steps, and the episodes that
        wait in it those that the ledger has accepted."""
        ledger, size = said.ledger, self.plan.batch_size
        if ledger["trained"] != said.step:
            self.problems.append(
                f"{name}: its ledger has {ledger['trained']} updates trained, but the checkpoint is of {said.step}."
            )
        if ledger["attempt"] != said.attempt:
            self.problems.append(f"{name}: its ledger is of attempt {ledger['attempt']}, it itself of {said.attempt}.")
        accepted = said.accepted
        admitted = min(ledger["version"] + self.plan.max_staleness + 1, self.plan.updates) * size
        for slot in accepted:
            if slot < said.step * size:
                self.problems.append(f"{name}: slot {slot} waits to be trained, but update {slot // size + 1} is done.")
            elif slot >= admitted:
                self.problems.append(f"{name}: slot {slot} was accepted, but only {admitted} are admitted.")
        if said.waiting != accepted:
            apart = sorted(set(said.waiting) ^ set(accepted)) or said.waiting
            self.problems.append(
                f"{name}: its episodes are not those that its ledger has accepted: see {_named(apart)}."
            )
        for network, steps in self.plan.steps(said.step).items():
            if said.steps.get(network) != steps:
                self.problems.append(
                    f"{name}: the optimiser of the {network} network has taken {said.steps.get(network, 'no')} steps, "
                    f"but {said.step} updates are {steps}."
                )

    # metrics -------------------------------------------------------------------------------------------------------

    def _metric_lines(self) -> None:
        """Every committed update has one line: the learner writes it before the checkpoint that holds the update."""
        steps = self.files.metric_steps()
        if steps is None:
            return
        lines = Counter(steps)
        self.problems += [
            f"metrics.jsonl has more than one line of update {step}." for step, times in lines.items() if times > 1
        ]
        missing = [update for update in range(1, self.found.updates + 1) if update not in lines]
        if missing:
            self.problems.append(f"metrics.jsonl has no line of {_named(missing, 'update')}.")
        beyond = sorted(update for update in lines if update > self.found.updates)
        if self.files.finished is not None and beyond:
            self.problems.append(f"metrics.jsonl has a line of {_named(beyond, 'update')}, which the stage has not.")

    # sums ----------------------------------------------------------------------------------------------------------

    def _balance(self) -> None:
        """What was generated in each attempt must at least be what of it was kept; the rest of it was rolled back."""
        for number, tally in self.tallies.items():
            if tally.generated is None:
                continue
            if tally.generated < self.kept[number]:
                self.problems.append(
                    f"attempts/counts.json: attempt {number} generated {tally.generated} slots, but "
                    f"{self.kept[number]} of it are there."
                )
            # What the newest attempt of an unfinished stage holds beyond the checkpoint is in no file.
            if self.found.finished or number != self.segments[-1].attempt:
                tally.discarded = max(0, tally.generated - self.kept[number])


def _slots_are(slots: Sequence[int]) -> str:
    return f"{_named(slots)} {'is' if len(slots) == 1 else 'are'}"


def _named(numbers: Sequence[int], what: str = "slot") -> str:
    shown = ", ".join(str(number) for number in numbers[:SHOWN])
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"{what}{'' if len(numbers) == 1 else 's'} {shown}{more}"
