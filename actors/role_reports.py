"""What generators and scoring processes say of themselves, and the metrics that two such reports in a row give."""

import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class RoleReport:
    """Counters of one actor since it started, at Unix time `at_s`: seconds at work, tokens written or read, CPU seconds
    of its process, and its peak memory so far."""

    at_s: float
    busy_s: float
    tokens: int
    cpu_s: float
    peak_bytes: int


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report_now(busy_s: float, tokens: int) -> RoleReport:
    """The report of this process, which has been at work for `busy_s` and has handled `tokens`, and of the processes
    below it, such as those of a divided engine; of those it has the memory of now for the peak."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s, memory_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess), each.oneshot():
            times = each.cpu_times()
            cpu_s, memory_bytes = cpu_s + times.user + times.system, memory_bytes + each.memory_info().rss
    return RoleReport(time.time(), busy_s, tokens, cpu_s, memory_bytes)


def role_figures(role: str, before: Mapping[str, RoleReport], now: Mapping[str, RoleReport]) -> dict[str, float]:
    """Metrics of all actors of a role between two of their reports, by actor; those without a first one are left out.

    The share of time they worked and the cores they used (means over actors), their tokens a second together, and the
    highest peak memory of one.
    """
    names = [name for name in now if name in before and now[name].at_s > before[name].at_s]
    figures = {f"memory/{role}_bytes": float(max((report.peak_bytes for report in now.values()), default=0))}
    if names:
        seconds = {name: now[name].at_s - before[name].at_s for name in names}
        figures |= {
            f"{role}/busy_share": sum((now[n].busy_s - before[n].busy_s) / seconds[n] for n in names) / len(names),
            f"{role}/cores": sum((now[n].cpu_s - before[n].cpu_s) / seconds[n] for n in names) / len(names),
            f"{role}/tokens_per_second": sum((now[n].tokens - before[n].tokens) / seconds[n] for n in names),
        }
    return figures
