"""vLLM's scheduler, whose prefix cache begins anew while requests run and keep the keys and values that they hold.

Runs in the process of an engine's loop, which imports it by its name.
"""

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class SaltingScheduler(Scheduler):
    """Keys of the prefix cache begin with how often it began anew: what was written before is found by nobody who has
    yet to begin."""

    _beginnings = 0

    def add_request(self, request: Request) -> None:
        """Take in a request, which finds what was written since the last beginning."""
        self._salt(request)
        super().add_request(request)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Begin the cache anew. Without `reset_running_requests` running requests go on with what they hold; those
        that wait hold nothing, having not begun or having lost it to want of memory. True, unless vLLM could not
        empty the cache with it."""
        self._beginnings += 1
        for request in self.waiting:
            self._salt(request)
        return super().reset_prefix_cache(True, reset_connector) if reset_running_requests else True

    def _salt(self, request: Request) -> None:
        request.cache_salt = f"beginning {self._beginnings}"
        request.block_hashes.clear()
        request.update_block_hashes()
