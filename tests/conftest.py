"""What every test may use: the folders of test material beside the repository, and quiet, repeatable threads."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

with suppress(ImportError):  # the tests of a GPU do without hypothesis
    from hypothesis import HealthCheck, settings

    # How long an input takes to draw says nothing on a machine that does other things as well.
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")

# Before torch is imported: the suite shares the machine, and one thread makes sums come in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Plans and kernels are compiled once a run, and nothing of the user's own cache is read or written.
_CACHE = tempfile.TemporaryDirectory(prefix="graphserve-tests-")
os.environ["GRAPHSERVE_CACHE"] = _CACHE.name
# No test may reach the network: a model that is not on disk has to give an error, not a download.
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


def _folder_or_skip(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/{name} beside the repository")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of reference checkpoints with golden tokens; the test is skipped where it is absent."""
    return _folder_or_skip("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of prompts and texts; the test is skipped where it is absent."""
    return _folder_or_skip("data")


@pytest.fixture(scope="session")
def shared_tokenizers() -> Path:
    """The folder of published tokenizers; the test is skipped where it is absent."""
    return _folder_or_skip("tokenizers")
