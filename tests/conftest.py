"""Fixtures that every test may use: ranks (see ranks.py), the shared CIFAR images, the tree's root."""
import os
import pathlib

import pytest
from ranks import Ranks

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config):
    """An instrumented run must not pass because it loaded the ordinary build."""
    expected = os.environ.get("DSC_EXPECT_CORE")
    if expected:
        import deepspeed_c._core as core

        if not core.__file__.startswith(expected):
            raise pytest.UsageError(f"deepspeed_c._core came from {core.__file__}, not from {expected}")


def pytest_collection_modifyitems(items):
    """What uses several ranks is marked, so that a single-process run can leave it out."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("ranks")


@pytest.fixture(scope="session")
def ranks():
    """ranks(n, fn, *args, timeout=60) and ranks.outcomes(...): see ranks.py."""
    return Ranks()


@pytest.fixture(scope="session")
def root():
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def cifar():
    """A folder with CIFAR-10 in the binary layout; tests that need it skip where there is none."""
    folder = ROOT.parent / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/cifar10 beside this tree")
    return folder
