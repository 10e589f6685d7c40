"""`python -m bench.control_plane`: how many generators one stream, conductor and weight store can keep at work.

Those three are the real actors. Around them, in a Ray session of this machine, are generators without engines, which
only wait where an engine would work, a scorer that answers at once, and a learner that trains nothing: what is measured
is the control plane, and the machine under it. Every number of generators is a PPO stage of its own.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.scaling import Level, latency_of, linearity, table, verdict
from bench.simulated_generators import Observed
from bench.simulated_stage import CHUNK_SIZE, CHUNKS_MEASURED, Cast, Options, TimeUp, cast_of, stage_of
from cluster.session import session
from corpus.problems import RunProblem

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_PROCESSES = 8
WARM_UP_S = 4.0
STAGE_S = 15.0
"""Seconds to begin and end a stage, before one has shown what it takes here."""
LOOK_S = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every number of generators that there is time for, prints what came of it, returns the exit code."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    counts = sorted(set(asked.generators))
    if counts[0] < 1 or asked.rate <= 0 or asked.seconds <= 0:
        parser.error("--generators, --rate and --seconds are above 0")
    if not 1 <= asked.processes <= MOST_PROCESSES:
        parser.error(f"--processes is from 1 to {MOST_PROCESSES}")
    options = Options(asked.rate, asked.seconds, time.monotonic() + asked.total_s)
    cores, problem = len(os.sched_getaffinity(0)), None
    levels: list[Level] = []
    try:
        with tempfile.TemporaryDirectory(prefix="amenable-bench-") as temporary, session(None, cpus=1):
            _say(f"starting {asked.processes} processes of generators")
            cast = cast_of(min(asked.processes, counts[-1]), options)
            for level in measured(counts, options, cast, Path(temporary)):
                levels.append(level)
                _say(f"{level.generators} generators: {level.episodes_per_s:.1f} episodes/s")
    except TimeUp as up:
        _say(str(up))
    except RunProblem as error:
        problem = str(error)
        _say(problem)
    left_out = counts[len(levels) :]
    if asked.json:
        print(json.dumps(_answer(levels, left_out, options, cores) | {"problem": problem}, indent=2))
    elif levels:
        _tell(levels, left_out, options, cores, asked.processes)
    return 1 if problem is not None or not levels else 0


def measured(counts: Sequence[int], options: Options, cast: Cast, directory: Path) -> Iterator[Level]:
    """A level for each number of generators, smallest first. Raises TimeUp once there is no time for the next one, and
    RunProblem where the control plane failed."""
    stage_s = STAGE_S
    for generators in counts:
        needed_s = stage_s + WARM_UP_S + options.measured_s(generators)
        if time.monotonic() + needed_s > options.give_up:
            raise TimeUp(f"There is no time left for {generators} generators, which would take {needed_s:.0f} s.")
        began = time.monotonic()
        place = directory / f"{generators}"
        place.mkdir()
        yield measure(generators, options, cast, place)
        stage_s = time.monotonic() - began - WARM_UP_S - options.measured_s(generators)


def measure(generators: int, options: Options, cast: Cast, directory: Path) -> Level:
    """One stage with so many generators, in the empty `directory`.

    Raises RunProblem where an actor failed or an episode was generated twice or lost, TimeUp at the end of the time.
    """
    load = os.getloadavg()[0]
    with stage_of(generators, options, cast, directory) as stage, ThreadPoolExecutor(1) as pool:
        learning = pool.submit(stage.learn)
        try:
            _watch(learning, WARM_UP_S)
            stage.observe()
            cpu, machine, began = stage.cpu_seconds(), _machine_cpu_seconds(), time.monotonic()
            _watch(learning, options.measured_s(generators))
            seen = stage.observe()
            while not _enough(seen):
                if time.monotonic() > options.give_up:
                    raise TimeUp(f"{generators} generators had too little accepted when the time was up.")
                _watch(learning, LOOK_S)
                seen = [one.and_then(more) for one, more in zip(seen, stage.observe(), strict=True)]
            seconds = time.monotonic() - began
            cpu_after, machine_after = stage.cpu_seconds(), _machine_cpu_seconds()
        finally:
            stage.stop.set()
        learning.result()
        stage.end()
    lease_s, accept_s = ([each for one in seen for each in getattr(one, name)] for name in ("lease_s", "accept_s"))
    written_s, drawn_s = sum(one.written_s for one in seen), sum(one.drawn_s for one in seen)
    return Level(
        generators=generators,
        seconds=seconds,
        episodes=sum(one.episodes for one in seen),
        episodes_per_s=sum(one.episodes / one.seconds for one in seen),
        lease=latency_of(lease_s),
        accept=latency_of(accept_s),
        publish_s=stage.published,
        cores={role: (cpu_after[role] - cpu[role]) / seconds for role in cpu},
        machine_cores=(machine_after - machine) / seconds,
        waiting=max(0.0, 1.0 - written_s / (generators * seconds)),
        late=written_s / drawn_s - 1.0,
        load=load,
    )


def _enough(seen: Sequence[Observed]) -> bool:
    """Whether there was a lease, and as much was accepted as a rate is told from."""
    return any(one.lease_s for one in seen) and sum(len(one.accept_s) for one in seen) >= CHUNKS_MEASURED


def _watch(learning: "Future[None]", seconds: float) -> None:
    """Waits, unless the learner fails meanwhile: its problem is raised."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if learning.done():
            learning.result()
        time.sleep(min(LOOK_S, max(end - time.monotonic(), 0.0)))


def _machine_cpu_seconds() -> float:
    """Of all that runs on the machine: the time of its cores that was not idle."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    user, nice, system, _idle, _iowait, *rest = map(int, first)
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _parser() -> argparse.ArgumentParser:
    says = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="python -m bench.control_plane", description=says)
    parser.add_argument("--generators", type=int, nargs="+", default=list(COUNTS), help="numbers of them to measure")
    parser.add_argument("--rate", type=float, default=4.0, help="episodes/s that one generator makes by itself")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured at each number, at least")
    parser.add_argument(
        "--processes", type=int, default=4, help=f"that the generators are in, {MOST_PROCESSES} at most"
    )
    parser.add_argument(
        "--total-s", type=float, default=285.0, help="the whole ends by then; what is not reached is said"
    )
    parser.add_argument("--json", action="store_true", help="one JSON answer on standard output")
    return parser


def _answer(levels: Sequence[Level], left_out: list[int], options: Options, cores: int) -> dict[str, Any]:
    found = linearity({each.generators: each.episodes_per_s for each in levels}, options.rate)
    return {
        "rate": options.rate,
        "cores": cores,
        "levels": [asdict(each) | {"of_linear": each.of_linear(options.rate)} for each in levels],
        "linear": asdict(found),
        "verdict": verdict(levels, options.rate, cores) if levels else "",
        "left_out": left_out,
    }


def _tell(levels: Sequence[Level], left_out: list[int], options: Options, cores: int, processes: int) -> None:
    print(
        f"Each generator makes {options.rate:g} episodes/s by itself, in chunks of {CHUNK_SIZE}; {processes} processes "
        f"of generators, {cores} cores, load {levels[0].load:.1f} before"
    )
    for line in table(levels, options.rate):
        print(line)
    print(verdict(levels, options.rate, cores))
    if left_out:
        print(f"Not reached in the time there was: {', '.join(map(str, left_out))} generators.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
