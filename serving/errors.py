"""Errors of the service as OpenAI's API has them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

import json
import math

REPLACED_S = 5.0
"""Seconds after which a client should ask again where the replica that it came to is broken. House default."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What a request is answered with instead of what it asked for. `retry_after_s` tells when to try again."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of the answer, as ASGI has them."""
        found = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b'Bearer realm="amenable"'))
        return found


def engine_lost() -> ApiError:
    """503: the engine that was to answer has died; its replica is replaced, and others may answer meanwhile."""
    said = "The engine of this replica has died and is being replaced; ask again in a few seconds."
    return ApiError(503, "engine_lost", said, retry_after_s=REPLACED_S)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """400: something in the request is wrong."""
    return ApiError(400, "invalid_value", message, param)
