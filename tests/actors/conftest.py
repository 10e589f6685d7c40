import logging

import pytest


@pytest.fixture(scope="package")
def ray_session():
    """A local Ray session for the tests of this room that run real actors."""
    import ray

    from cluster.session import session

    with session(None, cpus=2):
        logging.getLogger("ray").setLevel(logging.ERROR)
        yield ray
