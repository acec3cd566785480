"""Settings shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Random search stays random at a desk, where a new counterexample is welcome; in CI the same
# commit gives the same answer twice. "pytest tests/kernels --hypothesis-profile thorough" tries at
# least 300 shapes per kernel family.
settings.register_profile("desk", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=600)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled kernels between runs, out of the user's own cache; times no kernels."""
    os.environ.setdefault("GRAPHOPT_SELECTION", "estimate")
    if "GRAPHOPT_CACHE_DIR" not in os.environ:
        folder = config.cache.mkdir("graphopt")
        folder.chmod(0o700)
        os.environ["GRAPHOPT_CACHE_DIR"] = str(folder)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
