"""Processes of this machine, as the kernel knows them: numbers are used again, but not at the same time."""

from pathlib import Path


def started_ticks(pid: int) -> str | None:
    """When the living process `pid` began, in clock ticks since the machine did: what tells it from a later one.

    None where there is none, or where it is dead and only not yet waited for.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = status.rpartition(")")[2].split()  # after the command's name, which may hold spaces and brackets
    state, ticks = fields[0], fields[19]  # proc(5): fields 3 and 22
    return None if state in "ZX" else ticks
