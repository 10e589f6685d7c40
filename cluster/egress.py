"""Where a run's pods go beyond one another, and the NetworkPolicy rules that let them: HTTPS, and the servers that a
recipe names. Pure.

A policy knows addresses and labels, not names of hosts, so a server outside the cluster opens its port to everywhere
but the cloud's metadata service; one inside it, which its name tells, opens it to the pods of one namespace.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from corpus.storage import is_object_store

HTTPS = 443
PORTS = {"https": HTTPS, "http": 80}

_OF_A_NAMESPACE = re.compile(r"[^.]+\.([^.]+)\.svc(\.cluster\.local)?\.?")


@dataclass(frozen=True, order=True)
class Server:
    """A server that pods talk to, as the recipe names it."""

    host: str
    port: int

    @property
    def namespace(self) -> str | None:
        """The namespace of a Service of the cluster: of SERVICE.NAMESPACE.svc; "" for that of the pods (a name without
        a dot). None for all else."""
        found = _OF_A_NAMESPACE.fullmatch(self.host)
        if found:
            return found[1]
        return "" if re.fullmatch(r"[a-z][a-z0-9-]*", self.host) else None


def server_of(address: str) -> Server | None:
    """The server that a web address or one in an object store names; None where the store is its provider's own."""
    if not is_object_store(address):
        parts = urlsplit(address)
        return Server(parts.hostname or "", parts.port or PORTS.get(parts.scheme, HTTPS))
    options = parse_qs(address.partition("?")[2])
    [override] = options.get("endpoint_override", [""])[-1:]
    if not override:
        return None
    parts = urlsplit(f"//{override}")
    return Server(parts.hostname or "", parts.port or PORTS.get(options.get("scheme", ["https"])[-1], HTTPS))


def ports_outside(servers: Iterable[Server]) -> list[dict[str, Any]]:
    """The ports of everywhere outside the cluster that pods may go to."""
    ports = {HTTPS} | {server.port for server in servers if server.namespace is None}
    return [{"protocol": "TCP", "port": port} for port in sorted(ports)]


def rules_inside(servers: Iterable[Server]) -> list[dict[str, Any]]:
    """A rule for each namespace of the cluster with a server in it."""
    ports: dict[str, set[int]] = {}
    for server in servers:
        if server.namespace is not None:
            ports.setdefault(server.namespace, set()).add(server.port)
    return [
        {
            "to": [
                {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
                if namespace
                else {"podSelector": {}}
            ],
            "ports": [{"protocol": "TCP", "port": port} for port in sorted(found)],
        }
        for namespace, found in sorted(ports.items())
    ]
