"""Who may use a service: bearer tokens with scopes, kept as hashes, and cookie sessions of browsers that log in.

A token is `amn_<id>_<secret>`; what is kept is its SHA-256, which is enough for a secret of 256 random bits. Tokens
come from a JSON file (`{"schema_version": 1, "tokens": [{"id", "name", "scopes", "sha256", "created"}]}`), which is
read anew when it changes, so that a token can be revoked while the service runs; or from the environment variable
AMENABLE_TOKENS, with the same JSON. Sessions are signed with a secret of the run, and end with their token.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from corpus.file_lock import file_lock
from corpus.problems import RunProblem, UsageProblem
from serving.page.backend import CSRF_HEADER, SESSION_COOKIE, Scope, Session, Visitor
from serving.stored_sessions import StoredSessions

TOKENS_VARIABLE = "AMENABLE_TOKENS"
"""Environment variable with the JSON of a token file (hashes, never tokens)."""

SCHEMA_VERSION = 1
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
SESSION_S = 8 * 3600
"""How long a browser stays logged in, seconds. House default: a working day."""

LOCK_S = 15.0
"""Seconds that a change of a token file waits for those of other processes. House default, as of an audit log."""

_TOKEN = re.compile(r"amn_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_COOKIE = re.compile(r"([0-9a-f]{12})\.(\d{1,12})\.([0-9a-f]{32})\.([0-9a-f]{64})")
_NOBODY = hashlib.sha256(b"nobody").hexdigest()


@dataclass(frozen=True)
class KeptToken:
    """What is kept of a token. `sha256` is of the whole token (hex)."""

    id: str
    name: str
    scopes: frozenset[Scope]
    sha256: str
    created: str


def parse_tokens(text: str, where: str) -> dict[str, KeptToken]:
    """The tokens in the JSON `text`, by id. Raises UsageProblem, naming `where`, for what is no token file."""
    try:
        content = json.loads(text)
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError("it is of another version of the program")
        found = {}
        for each in content["tokens"]:
            token = KeptToken(
                str(each["id"]), str(each["name"]), frozenset(each["scopes"]), str(each["sha256"]), str(each["created"])
            )
            if not token.scopes <= SCOPES or not re.fullmatch(r"[0-9a-f]{64}", token.sha256):
                raise ValueError(f"token {token.id} has an unknown scope or no sha256")
            found[token.id] = token
    except (ValueError, KeyError, TypeError) as error:
        raise UsageProblem(
            f"{where} is no token file ({error}); make one with amenable tokens add.", "serving/tokens"
        ) from None
    return found


def new_token(file: Path, name: str, scopes: frozenset[Scope]) -> str:
    """A new token, which nobody can read again; its hash is added to `file`. Raises UsageProblem for a file that is not
    a token file or cannot be written."""
    if not name or len(name) > 80 or not name.isprintable():
        raise UsageProblem(
            "A token's name should be 1 to 80 printable characters, such as the name of who uses it.", "serving/tokens"
        )
    token_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    token = f"amn_{token_id}_{secret}"
    kept = KeptToken(token_id, name, scopes, _sha256(token), datetime.now(UTC).isoformat(timespec="seconds"))
    _change(file, lambda tokens: {**tokens, token_id: kept})
    return token


def revoke_token(file: Path, token_id: str) -> None:
    """Remove a token. Raises UsageProblem where the file has none of this id."""

    def without(tokens: dict[str, KeptToken]) -> dict[str, KeptToken]:
        if token_id not in tokens:
            raise UsageProblem(
                f"{file} has no token {token_id}; it has {', '.join(sorted(tokens)) or 'none'}.", "serving/tokens"
            )
        return {each: kept for each, kept in tokens.items() if each != token_id}

    _change(file, without)


def read_tokens(file: Path) -> dict[str, KeptToken]:
    """The tokens of `file`, by id. Raises UsageProblem where it cannot be read."""
    try:
        return parse_tokens(file.read_text(encoding="utf-8"), str(file))
    except OSError as error:
        raise UsageProblem(
            f"{file} cannot be read ({error.strerror}); make it with amenable tokens add.", "serving/tokens"
        ) from None


class Access:
    """Decides who a request is from. Without tokens the service is open, to this machine alone."""

    def __init__(self, run: Path, token_file: Path | None, shared: StoredSessions | None = None) -> None:
        """`run` is a directory of this machine; `shared` is what other machines know of its sessions, where an object
        store keeps the run.

        Raises UsageProblem where the token file, or AMENABLE_TOKENS where there is none, is not one; RunProblem
        where the secret of the run's sessions cannot be kept."""
        self._file = token_file
        self._stamp: tuple[int, int] | None = None
        self._tokens: dict[str, KeptToken] = {}
        self._lock = threading.Lock()
        self._ended: dict[str, float] = {}
        if token_file is not None:
            self._tokens = read_tokens(token_file)
        elif os.environ.get(TOKENS_VARIABLE):
            self._tokens = parse_tokens(os.environ[TOKENS_VARIABLE], TOKENS_VARIABLE)
        self.open = token_file is None and not self._tokens
        """Whether nobody needs a token."""
        self._ended_file = run / "serving" / "ended-sessions"
        self._ended_stamp: tuple[int, int] | None = None
        self._shared = shared
        if self.open:
            self._secret = b""
        else:
            self._secret = _run_secret(run / "serving" / "session.key") if shared is None else shared.secret

    def visitor(self, headers: Mapping[str, str]) -> Visitor | None:
        """Who sends these headers (names in lower case): by bearer token, else by session cookie; None where neither is
        valid. Whether a session's request carries its CSRF token is `csrf_holds`."""
        if self.open:
            return Visitor(name="this machine", scopes=SCOPES, login=False)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            kept = self._owner(token.strip())
            return None if kept is None else Visitor(name=kept.name, scopes=kept.scopes)
        cookie = _cookie(headers.get("cookie", ""))
        return None if cookie is None else self._of_session(cookie)

    def log_in(self, token: str) -> Session | None:
        """A session for the owner of `token`; None where the token is not valid."""
        kept = self._owner(token.strip())
        if kept is None:
            return None
        signed = f"{kept.id}.{int(time.time()) + SESSION_S}.{secrets.token_hex(16)}"
        cookie = f"{signed}.{self._signature(signed, kept)}"
        visitor = Visitor(name=kept.name, scopes=kept.scopes, csrf=self._csrf(cookie))
        return Session(cookie=cookie, seconds=SESSION_S, visitor=visitor)

    def log_out(self, cookie: str) -> None:
        """Ends the session of this cookie everywhere, if there is one: on other machines within seconds. Raises
        RunProblem where those cannot be told."""
        match = _COOKIE.fullmatch(cookie)
        if self.open or match is None or self._of_session(cookie) is None:
            return
        if self._shared is not None:
            self._shared.end(match[3], match[2])  # first: where it fails, the session is still there to be ended
        self._ended_file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._ended_file, "a", encoding="utf-8") as stream:
            stream.write(f"{match[3]} {match[2]}\n")

    def _owner(self, token: str) -> KeptToken | None:
        match = _TOKEN.fullmatch(token)
        kept = self._present().get(match[1]) if match is not None else None
        # Compared where there is nothing to compare with too, so that the time does not tell whether an id exists.
        same = hmac.compare_digest(_sha256(token), kept.sha256 if kept is not None else _NOBODY)
        return kept if same else None

    def _of_session(self, cookie: str) -> Visitor | None:
        match = _COOKIE.fullmatch(cookie)
        if match is None:
            return None
        kept = self._present().get(match[1])
        signed = cookie.rpartition(".")[0]
        if kept is None or not hmac.compare_digest(self._signature(signed, kept), match[4]):
            return None
        if int(match[2]) < time.time() or match[3] in self._ended_sessions():
            return None
        return Visitor(name=kept.name, scopes=kept.scopes, csrf=self._csrf(cookie))

    def _signature(self, signed: str, kept: KeptToken) -> str:
        return hmac.new(self._secret, f"session {signed} {kept.sha256}".encode(), hashlib.sha256).hexdigest()

    def _csrf(self, cookie: str) -> str:
        return hmac.new(self._secret, f"csrf {cookie}".encode(), hashlib.sha256).hexdigest()

    def _present(self) -> dict[str, KeptToken]:
        """The tokens as the file has them now; as they were, where it is being replaced; none where it is gone."""
        if self._file is None:
            return self._tokens
        with self._lock:
            try:
                stamp = _stamp(self._file)
                if stamp != self._stamp:
                    self._tokens, self._stamp = read_tokens(self._file), stamp
            except FileNotFoundError:
                self._tokens, self._stamp = {}, None
            except (OSError, UsageProblem):
                self._tokens, self._stamp = {}, None  # what cannot be read lets nobody in
            return self._tokens

    def _ended_sessions(self) -> dict[str, float]:
        with self._lock:
            try:
                stamp = _stamp(self._ended_file)
            except OSError:
                return {}
            if stamp != self._ended_stamp:
                lines = self._ended_file.read_text(encoding="utf-8").split("\n")
                pairs = (line.split(" ") for line in lines if line.count(" ") == 1)
                self._ended = {nonce: float(until) for nonce, until in pairs}
                self._ended_stamp = stamp
            return self._ended


def csrf_holds(visitor: Visitor, headers: Mapping[str, str]) -> bool:
    """Whether a request that is not a GET may come from this visitor: a session's carries its CSRF token."""
    return visitor.csrf is None or hmac.compare_digest(
        headers.get(CSRF_HEADER, "").encode("utf-8", "replace"), visitor.csrf.encode()
    )


def _cookie(header: str) -> str | None:
    for part in header.split(";"):
        name, equals, value = part.strip().partition("=")
        if equals and name == SESSION_COOKIE:
            return value
    return None


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _run_secret(path: Path) -> bytes:
    """32 random bytes that all replicas of the run's service share, readable by their user alone."""
    try:
        path.parent.mkdir(exist_ok=True)
        try:
            made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(made, "wb") as stream:
                stream.write(secrets.token_bytes(32))
        except FileExistsError:
            pass
        for _ in range(100):  # another replica may be writing it at this moment
            secret = path.read_bytes()
            if len(secret) == 32:
                return secret
            time.sleep(0.01)
    except OSError as error:
        raise RunProblem(
            f"{path} cannot be kept ({error.strerror}): sessions need a secret of the run.", "serving/sessions"
        ) from error
    raise RunProblem(f"{path} is not the secret of a run's sessions: remove it.", "serving/sessions")


def _change(file: Path, change: Any) -> None:
    """Read, change and write a token file while nobody else does; it is readable by its owner alone. Raises
    UsageProblem where that cannot be done, or another process has been at it for LOCK_S."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(file.with_name(f".{file.name}.lock"), LOCK_S):
            tokens = read_tokens(file) if file.exists() else {}
            kept = change(tokens)
            content = {
                "schema_version": SCHEMA_VERSION,
                "tokens": [
                    {"id": t.id, "name": t.name, "scopes": sorted(t.scopes), "sha256": t.sha256, "created": t.created}
                    for t in kept.values()
                ],
            }
            partial = file.with_name(f"{file.name}.partial")
            with os.fdopen(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as stream:
                json.dump(content, stream, indent=2)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
    except OSError as error:
        raise UsageProblem(f"{file} cannot be written ({error.strerror}).", "serving/tokens") from None
