"""What replicas on several machines must know alike of browsers' sessions, in the object store that keeps the run: the
secret that signs them, and those that were ended before their time."""

import secrets
from functools import cached_property

from corpus.agreed_value import AgreedValue
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import below, one_line, opened, without_options

SECRET = "serving/session-key"
ENDED = "serving/ended-sessions"
"""Directory of empty objects NONCE-UNTIL: a session's random part, and when it would have ended (Unix seconds)."""

SECRET_BYTES = 32


class StoredSessions:
    """Of the run at `address`."""

    def __init__(self, address: str) -> None:
        """Raises UsageProblem where the address cannot be understood."""
        self._address = address

    @cached_property
    def secret(self) -> bytes:
        """The random bytes that all replicas share, those that start at the same time too; the first to ask makes them.
        Raises RunProblem where the store does not give or take them, or where replicas do not agree in time."""
        text = AgreedValue(below(self._address, SECRET)).get(secrets.token_bytes(SECRET_BYTES).hex().encode())
        try:
            found = bytes.fromhex(text.decode())
        except ValueError:
            found = b""
        if len(found) != SECRET_BYTES:
            place = f"{without_options(self._address)}/{SECRET}"
            raise RunProblem(f"{place} is not the secret of a run's sessions: remove it.", "serving/sessions")
        return found

    def end(self, nonce: str, until: str) -> None:
        """Says to all replicas that a session has ended. Raises RunProblem where the store does not take it."""
        try:
            filesystem, inner = opened(below(self._address, ENDED))
            with filesystem.open_output_stream(f"{inner}/{nonce}-{until}") as stream:
                stream.write(b"")
        except (OSError, UsageProblem) as error:
            place = f"{without_options(self._address)}/{ENDED}"
            raise RunProblem(
                f"{place} could not be written ({one_line(error)}): log out again.", "serving/sessions"
            ) from error
