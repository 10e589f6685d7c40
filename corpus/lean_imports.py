"""Keeps scikit-learn and scipy out of processes that use transformers.

Where they are installed, transformers imports them for assisted generation and for losses of object detection, which
nothing here calls. With pandas, which comes with them, that is about half of the time that importing a model takes, in
every process of a run. Evaluation imports scikit-learn itself, where it fits a baseline.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NOT_NEEDED: Mapping[str, str] = {
    "transformers.generation.candidate_generator": "is_sklearn_available",
    "transformers.loss.loss_for_object_detection": "is_scipy_available",
}
"""Modules of transformers that import one of them, and the function of `transformers.utils` that they ask before."""


class _BeforeThem(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds nothing itself: only notes that one of the modules is about to be imported."""
        if fullname in NOT_NEEDED:
            utils = vars(sys.modules["transformers.utils"])
            asked = NOT_NEEDED[fullname]
            assert asked in utils, f"this version of transformers has no {asked} in its utils"
            utils[asked] = lambda: False
        return None


def keep_lean() -> None:
    """From now on transformers, if it is imported, does without them."""
    if not any(isinstance(finder, _BeforeThem) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeThem())
