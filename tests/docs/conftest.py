"""The documentation's generator and the pages it keeps."""

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def make() -> ModuleType:
    """docs/make.py as a module."""
    import docs.make

    return docs.make
