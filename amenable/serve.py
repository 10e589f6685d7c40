"""`amenable serve`, `pin` and `tokens`: the service of a run, what it serves as `policy`, and who may use it."""

import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from amenable import interruption
from amenable.run_directory import RunDirectory
from corpus.audit_log import actor_here
from corpus.problems import RunProblem, UsageProblem

if TYPE_CHECKING:
    from serving.served_run import ServedRun
    from serving.settings import ServingSettings

SERVE_ENVIRONMENT = {
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # The gateway is asynchronous and waits for engines in other processes: a thread of its own would only be one more
    # place where every message has to wait.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # What Ray Serve does by itself, ten times a second unless it is told otherwise: for one service on one machine that
    # is time taken from its engines.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
}
"""Set before Ray starts, unless the person has set them."""

LOOK_S = 5.0
"""Seconds between two looks at whether the service is still there."""

LOOK_AT_END_S = 0.2
"""The same while it ends."""

ENDS_S = 20.0
"""Seconds for replicas to end once they may not answer any longer. House default."""

log = logging.getLogger(__name__)


def served_run(run: str) -> "ServedRun":
    """The run meant by `run`: a directory that this machine and the replicas share, or one that an object store keeps.
    Raises UsageProblem where there is none."""
    from serving.served_run import ServedRun

    directory = RunDirectory.find(run)
    return ServedRun.of(str(directory.root) if directory.stored is None else directory.stored.address)


def check_listening(host: str, port: int, has_tokens: bool) -> None:
    """Raises UsageProblem where `host` is more than this machine and nobody needs a token, or is no address, or the
    port is taken."""
    if not has_tokens and not _is_loopback(host):
        raise UsageProblem(
            f"--host {host} is reachable from other machines, and there are no tokens: make one with "
            "amenable tokens add FILE NAME and give --token-file FILE.",
            "serving/open",
        )
    if not 0 < port < 65536:
        raise UsageProblem(f"--port {port} should be 1 to 65535.", "serving/port")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageProblem(
            f"The service cannot listen on {host}, port {port} ({error.strerror}).", "serving/port"
        ) from None


def serve(
    run: "ServedRun",
    host: str,
    port: int,
    address: str | None,
    token_file: Path | None,
    ready: Callable[[dict[str, Any]], None],
) -> None:
    """Serves the run until a stop is asked for. `ready` is told where, once every replica has generated a token, and
    why HAProxy does not stand before the replicas, where it could.

    Raises UsageProblem where it cannot be served so, RunProblem where it does not start or does not go on.
    """
    from serving.access import Access

    access = Access(run.root, token_file, run.sessions)  # a file that is none is told of at once
    check_listening(host, port, not access.open)
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from serving.front import BEHIND, fronted
    from serving.settings import ServingSettings

    run.look()
    run.names.skeleton()
    settings = ServingSettings.model_validate(run.names.recipe().get("serving", {}))
    # What stands before the replicas of a cluster is said by the environment of its processes.
    with fronted(host, settings.limits.request_s) if address is None else nullcontext() as no_haproxy:
        listens = {"url": _url(host, port), "open": access.open, "no_haproxy": no_haproxy}
        behind = BEHIND if address is None and no_haproxy is None else host
        _serve(run, settings, behind, port, address, token_file, lambda: ready({"run": run.name, **listens}))


def _serve(
    run: "ServedRun",
    settings: "ServingSettings",
    host: str,
    port: int,
    address: str | None,
    token_file: Path | None,
    ready: Callable[[], None],
) -> None:
    """See `serve`; `host` is where Ray Serve listens. It reads its environment when it is imported, which is here."""
    from cluster.session import session
    from serving.access import TOKENS_VARIABLE
    from serving.application import APPLICATION, Arguments, build

    if address is not None and os.environ.get(TOKENS_VARIABLE) and token_file is None:
        raise UsageProblem(
            f"Replicas in a cluster do not see {TOKENS_VARIABLE} of this shell: give --token-file FILE.",
            "serving/tokens",
        )
    arguments = Arguments(run=str(run.place), token_file=None if token_file is None else str(token_file.absolute()))
    cpus = settings.max_replicas * settings.threads * settings.engines + 1
    with session(address, cpus=cpus), _serving(host, port, address is None):
        from ray import serve as ray_serve

        _start(build(arguments.model_dump(mode="json")), run.name, settings.start_deadline_s)
        ready()
        while not interruption.wait(LOOK_S):
            status = ray_serve.status().applications.get(APPLICATION)
            if status is None or str(status.status.value) in ("DEPLOY_FAILED", "DELETING", "NOT_STARTED"):
                raise RunProblem(
                    f"The service of {run.name} has ended: {_reason(APPLICATION) or 'it was removed'}", "serving/start"
                )


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _start(application: Any, run: str, deadline_s: float) -> None:
    """Until every replica is ready.

    Raises RunProblem where it does not start, or not in time, Interrupted where a stop is asked for meanwhile.
    """
    from ray import serve as ray_serve

    from cluster.patience import call_within
    from serving.application import APPLICATION

    def start() -> None:
        ray_serve.run(application, name=APPLICATION, route_prefix="/", logging_config=_quiet())

    try:
        failure = call_within(deadline_s, start, lambda: interruption.stop_if_requested("the start of the service"))
    except TimeoutError:
        raise RunProblem(
            f"The service of {run} was not ready within {deadline_s:.0f} s (serving.start_deadline_s): "
            f"{_reason(APPLICATION) or 'Ray Serve does not say why.'}",
            "serving/start",
        ) from None
    if failure is not None:
        said = _reason(APPLICATION) or str(failure)
        raise RunProblem(f"The service of {run} did not start: {said}", "serving/start") from failure


@contextmanager
def _serving(host: str, port: int, own: bool) -> Iterator[None]:
    """Ray Serve for the block. In a session of our own it ends with it; in a cluster only the application does. Where
    the block comes to its end, the requests under way come to theirs first; a KeyboardInterrupt waits for none."""
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    from serving.application import APPLICATION

    ray_serve.start(
        proxy_location="HeadOnly" if own else "EveryNode",
        http_options=HTTPOptions(host=host, port=port),
        logging_config=_quiet(),
    )
    at_once = False
    try:
        yield
        if own:
            _end_application()
    except KeyboardInterrupt:  # asked twice: the end of a session of our own ends what is left
        at_once = True
        raise
    finally:
        if at_once and not own:
            ray_serve.delete(APPLICATION, _blocking=False)
        elif own and not at_once:
            ray_serve.shutdown()  # ends what stands before the replicas at once
        elif not own:
            _end_application()


def _end_application() -> None:
    """Until the replicas have ended, which nobody is sent to any more, with what they had. One that does not end in
    time is told of."""
    from ray import serve as ray_serve
    from ray.exceptions import RayError

    from serving.application import APPLICATION, DRAIN_S

    give_up = time.monotonic() + DRAIN_S + ENDS_S
    try:
        ray_serve.delete(APPLICATION, _blocking=False)
        while APPLICATION in ray_serve.status().applications:
            if time.monotonic() > give_up:
                why = _reason(APPLICATION) or "Ray Serve does not say why."
                log.warning("the replicas have not ended within %.0f s: %s", DRAIN_S + ENDS_S, why)
                return
            time.sleep(LOOK_AT_END_S)
    except RayError as error:  # its controller has died
        log.warning("Ray Serve does not say how far its end is: %s", error)


def _quiet() -> dict[str, Any]:
    return {"enable_access_log": False, "log_level": "WARNING"}


def _reason(application: str) -> str:
    """What Ray Serve says of an application that is not well."""
    from ray import serve as ray_serve

    status = ray_serve.status().applications.get(application)
    if status is None:
        return ""
    said = [each.message for each in status.deployments.values() if each.message] or [status.message]
    return " ".join(" ".join(said).split())[-1500:]


def pin(run: "ServedRun", version: str | None) -> dict[str, Any]:
    """Ask the replicas of the run's service to serve `version` ("newest", "policy@12" or "12") as `policy`; only look
    where it is None. Returns `wish` and `replicas`, what those that have spoken lately serve. Raises UsageProblem."""
    from dataclasses import asdict

    from serving.desired import read_reports, read_wish, write_wish

    wish = read_wish(run.place)
    if version is not None:
        pinned = None if version == "newest" else version if version.startswith("policy@") else f"policy@{version}"
        run.look()
        names = run.names
        if pinned is not None and names.find(pinned) is None:
            there = [name for name in names.all() if name.startswith("policy@")]
            raise UsageProblem(
                f"{run.name} has no published version {version}; it has {', '.join(there) or 'none'}, or newest.",
                "serving/version",
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        wish = write_wish(run.place, pinned, wish.counter, actor_here(), now)
    return {"wish": asdict(wish), "replicas": read_reports(run.place)}


def told(answer: dict[str, Any]) -> str:
    """What `pin` returned, for a person."""
    wish = answer["wish"]
    wanted = wish["pinned"] or "the newest weights"
    lines = [f"Wanted as policy: {wanted}" + (f", by {wish['who']} at {wish['when']}." if wish["who"] else ".")]
    for replica, says in answer["replicas"].items():
        held = ", ".join(f"{slot['model']} {slot['version']}" for slot in says["slots"] if slot["model"])
        lines.append(f"{replica}: {held or 'nothing'}" + (f" ({says['problem']})" if says["problem"] else ""))
    return "\n".join(lines if answer["replicas"] else [*lines, "No replica has spoken lately."])


def scopes_of(text: str) -> frozenset[Any]:
    """The scopes in "read,score". Raises UsageProblem for all else."""
    from serving.page.backend import Scope

    scopes = frozenset(part.strip() for part in text.split(","))
    if not scopes <= set(get_args(Scope)):
        raise UsageProblem(
            f"--scopes {text!r} should be some of {', '.join(get_args(Scope))}, with commas between.", "serving/tokens"
        )
    return scopes


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
