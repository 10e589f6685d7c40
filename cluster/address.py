"""Where a Ray cluster is: what an address may look like, and whether anybody answers there."""

import contextlib
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from corpus.problems import RunProblem, UsageProblem

PROBE_S = 5.0
"""Seconds for a connection to be made. A cluster answers in milliseconds."""

CLIENT_PORT = 10001
"""Ray's own default of the port behind ray://."""


class Unreachable(RunProblem):
    """Nobody answers where a cluster was said to be. The command ends with exit code 4."""


@dataclass(frozen=True)
class Place:
    """Host and port of a service."""

    host: str
    port: int

    def refusal(self, timeout_s: float = PROBE_S) -> OSError | None:
        """Why no connection can be made within `timeout_s` seconds; None where one can."""
        try:
            with contextlib.closing(socket.create_connection((self.host, self.port), timeout_s)):
                return None
        except OSError as error:
            return error
        except UnicodeError as error:  # a host name that cannot be one
            return OSError(str(error))


def cluster_place(address: str) -> Place | None:
    """Host and port of the cluster at `address` (HOST:PORT or ray://HOST:PORT); None for auto, which Ray looks up.

    Raises UsageProblem for all else.
    """
    if address == "auto":
        return None
    wrong = (
        f"Command line: {address!r} is no address of a Ray cluster; give HOST:PORT, as in 10.0.0.7:6379, "
        "ray://HOST:PORT or auto"
    )
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme != "ray":
        raise UsageProblem(f"{wrong}.", "cluster/address")
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageProblem(f"{wrong} ({error}).", "cluster/address") from None
    if scheme == "ray" and port is None:
        port = CLIENT_PORT
    if not host or not port or parts.netloc != rest or any(letter.isspace() for letter in rest):
        raise UsageProblem(f"{wrong}.", "cluster/address")
    return Place(host, port)


def check_cluster(address: str) -> None:
    """Raises UsageProblem where `address` cannot be a cluster's, Unreachable where nobody answers there."""
    place = cluster_place(address)
    refusal = None if place is None else place.refusal()
    if refusal is not None:
        raise Unreachable(
            f"Could not connect to the Ray cluster at {address} ({refusal}): is it running, and reachable from here?",
            "cluster/unreachable",
        )
