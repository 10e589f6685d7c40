"""A service over HTTP that scores: its address, its token, and what is tried again."""

import os
import time
from typing import Any
from urllib.parse import urlsplit

from actors.reward_protocol import Tokens, check_scores
from corpus.problems import RunProblem, UsageProblem


class HTTPReward:
    """A service: POST {"prompts": […], "responses": […]} is answered by {"scores": […]}.

    A refused or lost connection, a time-out, and the answers 429 and 5xx are tried again, after 0.5 s, 1 s, 2 s, … and
    at most 30 s, until the deadline; any other answer but 200 ends the run at once. The bearer token, where one is
    sent, is in no sentence, even if the service repeats it.
    """

    def __init__(
        self,
        url: str,
        rows_per_request: int,
        timeout_s: float,
        deadline_s: float,
        token_variable: str | None = None,
    ) -> None:
        import httpx

        self._name = f"reward service {url}"
        self._url = url
        self._rows_per_request = rows_per_request
        self._deadline_s = deadline_s
        try:
            scheme, parts = httpx.URL(url).scheme, urlsplit(url)
            has_place = bool(parts.hostname) and parts.port != 0  # `port` raises ValueError for one that cannot be
        except (httpx.InvalidURL, ValueError) as error:
            raise UsageProblem(f"{self._name}: this is no web address ({error}).", "reward/address") from error
        if scheme not in ("http", "https"):
            raise UsageProblem(f"{self._name}: the address should begin with http:// or https://.", "reward/address")
        if not has_place:
            raise UsageProblem(
                f"{self._name}: the address should name a host, as http://HOST:PORT/PATH does.", "reward/address"
            )
        self._token = None if token_variable is None else self._token_in(token_variable)
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        self._client = httpx.Client(timeout=timeout_s, headers=headers)

    def _token_in(self, variable: str) -> str:
        token = os.environ.get(variable, "").strip()  # one that comes from a file has the end of its line
        if not token:
            raise UsageProblem(
                f"{self._name}: the environment has no {variable}, which reward.token_variable names; set it where the "
                "scoring processes run.",
                "reward/token",
            )
        if not token.isascii() or not token.isprintable() or " " in token:
            raise UsageProblem(
                f"{self._name}: the value of {variable} is no bearer token: it has blanks or no ASCII.", "reward/token"
            )
        return token

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """See `Reward.score`; the tokens are not read."""
        scores: list[float] = []
        for start in range(0, len(responses), self._rows_per_request):
            chosen = slice(start, start + self._rows_per_request)
            answer = self._post({"prompts": prompts[chosen], "responses": responses[chosen]})
            scores += check_scores(answer, len(responses[chosen]), self._name)
        return scores

    def _post(self, body: dict[str, list[str]]) -> Any:
        import httpx

        give_up = time.monotonic() + self._deadline_s
        pause_s = 0.5
        while True:
            try:
                response = self._client.post(self._url, json=body)
                if response.status_code == 200:
                    return self._scores(response)
                failure = f"it answered {response.status_code} {self._without_token(response.text)[:200]!r}"
                if response.status_code != 429 and response.status_code < 500:
                    raise RunProblem(f"{self._name}: {failure}.", "reward/service")
            except httpx.TransportError as error:
                failure = f"{type(error).__name__} {error}".strip()
            if time.monotonic() + pause_s > give_up:
                raise RunProblem(
                    f"{self._name}: no scores within {self._deadline_s:g} s; at last, {failure}.", "reward/unreachable"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)

    def _without_token(self, text: str) -> str:
        return text if self._token is None else text.replace(self._token, "…")

    def _scores(self, response: Any) -> Any:
        try:
            return response.json()["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunProblem(
                f'{self._name}: its answer is not JSON with a list under "scores".', "reward/service"
            ) from error
