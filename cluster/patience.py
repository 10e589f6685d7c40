"""Calls that know no deadline and no Ctrl-C, waited for with both."""

import threading
import time
from collections.abc import Callable

LOOK_S = 0.2
"""Seconds between two looks at whether a stop is asked for."""


def call_within(deadline_s: float, call: Callable[[], object], meanwhile: Callable[[], None]) -> Exception | None:
    """Makes `call` on a thread of its own and waits for its end, with `meanwhile` called again and again.

    Returns what the call raised, None where nothing. Raises what `meanwhile` raises, and TimeoutError after
    `deadline_s` seconds; the thread goes on until it, or the process, ends.
    """
    failures: list[Exception] = []

    def work() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - returned to who waits
            failures.append(error)

    working = threading.Thread(target=work, name="call-within", daemon=True)
    give_up = time.monotonic() + deadline_s
    working.start()
    while working.is_alive():
        working.join(LOOK_S)
        meanwhile()
        if time.monotonic() > give_up and working.is_alive():
            raise TimeoutError
    return failures[0] if failures else None
