import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the modules that tests share

import pytest


@pytest.fixture(scope="module")
def ray_session():
    """A local Ray session for the tests of this room that run real actors."""
    import ray

    from cluster.session import session

    with session(None, cpus=2):
        logging.getLogger("ray").setLevel(logging.ERROR)
        yield ray
