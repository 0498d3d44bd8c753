"""What holds for all tests: how many threads, and what is skipped where there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

PRETENDED = ["kernels/pretend*.py", "ops/engines/cudnn/pretended.py"]
# For the processes of test_pretend_gpu.py alone, not even to be imported elsewhere.
collect_ignore_glob = [] if "pretend_gpu" in sys.modules else PRETENDED


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tests begin with one thread, whatever number others leave behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
