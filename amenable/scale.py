"""`amenable scale`: how many generators a PPO stage under way is to have. Its conductor follows within seconds."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from actors.desired import read_desired, read_fleet, write_desired
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import read_record
from corpus.audit_log import SCALED, actor_here, audited
from corpus.problems import UsageProblem


def wished(text: str) -> int:
    """The number in "generators=4". Raises UsageProblem for all else."""
    key, equals, value = text.partition("=")
    if key != "generators" or not equals:
        raise UsageProblem(
            f"Command line: {text!r} cannot be scaled; give generators=N, as in generators=4.", "fleet/wish"
        )
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UsageProblem(f"Command line: generators={value} should be a whole number above 0.", "fleet/wish")
    return int(value)


def scale(directory: RunDirectory, text: str | None) -> dict[str, Any]:
    """Ask for what `text` says ("generators=4") of the PPO stage of the run; only look where it is None.

    Returns `wish` (None before the first) and `fleet`, what the conductor last said (None where it has not). Raises
    UsageProblem where no PPO stage is under way, or somebody else has asked for something meanwhile.
    """
    wanted = None if text is None else wished(text)
    run = directory.root
    stages = sorted(run.glob("round-*/ppo"))
    if not stages:
        raise UsageProblem(
            f"{run} has not come to PPO yet; rollouts.generators in its recipe says how many there will be.",
            "run/not-so-far",
        )
    stage = stages[-1]
    if read_record(stage) is not None:
        raise UsageProblem(f"PPO in {run} is done: there is nothing to scale.", "run/over")
    wish = read_desired(stage)
    if wanted is not None:
        seen, before = (wish.counter, wish.generators) if wish is not None else (0, None)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with audited(directory.place, SCALED, {"generators": wanted, "before": before}):
            wish = write_desired(stage, seen, wanted, actor_here(), now)
    return {"wish": asdict(wish) if wish is not None else None, "fleet": read_fleet(stage)}


def told(answer: dict[str, Any]) -> str:
    """What `scale` returned, for a person."""
    wish, fleet = answer["wish"], answer["fleet"]
    lines = ["Nothing else than the recipe was asked for."]
    if wish is not None:
        lines = [f"Asked for: {wish['generators']} generators, by {wish['who']} at {wish['when']}."]
    if fleet is None:
        return "\n".join([*lines, "The run has not said yet who takes part."])
    lines.append("Last seen: " + ", ".join(f"{name} {state}" for name, state in fleet["workers"].items()) + ".")
    lines += [f"{waiting}." for waiting in fleet["waiting"]]
    return "\n".join([*lines, fleet["problem"]] if fleet["problem"] else lines)
