"""A Python function that scores, which is looked for in the working directory too."""

import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from actors.reward_protocol import Tokens, check_scores
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import one_line


class FunctionReward:
    """A Python function of (prompts, responses), two lists of texts, that returns one number for each response."""

    def __init__(self, name: str) -> None:
        """`name` is 'module:function', importable from the working directory. UsageProblem where it is not there."""
        self._name = f"reward function {name}"
        module_name, _, function_name = name.partition(":")
        if "" not in sys.path:
            sys.path.append("")  # an installed command does not look in the working directory by itself
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # whatever a module of the person's does as it is imported
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UsageProblem(f"{self._name}: the module cannot be imported ({reason}).", "reward/function") from error
        self._function: Callable[[list[str], list[str]], Any] = getattr(module, function_name, None)  # pyright: ignore[reportAttributeAccessIssue]
        if not callable(self._function):
            raise UsageProblem(
                f"{self._name}: the module {module_name} has no function {function_name}.", "reward/function"
            )

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """See `Reward.score`; the tokens are not read. RunProblem, with the place, where the function raises."""
        try:
            scores = self._function(list(prompts), list(responses))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise RunProblem(
                f"{self._name}: it raised {type(error).__name__}: {one_line(error)} ({at.filename}:{at.lineno}).",
                "reward/function",
            ) from error
        return check_scores(scores, len(responses), self._name)
