"""Supported versions come from the project file and, where that is not there, from the installed program: the same."""

from pathlib import Path

import pytest

from cluster.supported import STACK, is_older, is_supported, minimum_driver, supported, supported_by


def test_checkout_and_installed_program_say_the_same():
    found = supported()
    assert set(found.packages) == set(STACK)
    assert found == supported(Path("nowhere"))


def test_a_project_that_says_less_is_seen():
    with pytest.raises(AssertionError, match="no version of"):
        supported_by(">=3.11", ["torch==2.13.0"])


@pytest.mark.parametrize(
    ("version", "specifier", "will_do"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("3.11.7", ">=3.11,<3.12", True),
        ("3.12.0", ">=3.11,<3.12", False),
        ("not installed", "==1", False),
    ],
)
def test_versions_are_compared_as_pip_does(version, specifier, will_do):
    assert is_supported(version, specifier) is will_do


def test_drivers_are_compared_by_number():
    assert is_older("520.61.05", "525")
    assert not is_older("580.65.06", "580")
    assert minimum_driver("13.0") == "580"
    assert minimum_driver("99.0") is None
