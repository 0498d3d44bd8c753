"""Across modules: the host's code for CUDA runs before pretended GPUs (pretend_gpu.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
pytestmark = pytest.mark.skipif(
    torch.backends.cuda.is_built(), reason="pretend_gpu.py adds to a build of torch without CUDA"
)


def rehearse(*arguments: str | Path, interpret: bool = False) -> None:
    command = [sys.executable, HERE / "pretend_gpu.py", "-m", "pytest", "--tb=short", "--color=no"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = str(int(interpret))
    child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if child.returncode != 0:
        pytest.fail(child.stdout + child.stderr, pytrace=False)


def test_launches_and_compilation() -> None:
    rehearse(HERE / "pretended_launches.py", HERE / "pretended_compile.py", "-m", "not slow")


#: One of each kind of tests/test_gpu.py, the quickest.
QUICK = (
    "(bias_act_against and leaky_relu and float16) or conv_and_linear or test_cuda_graph "
    "or non_finite or autocast or current_one or benchmark or diagnose or training "
    "or (every_configuration and 1x1 and dgrad_act)"
)


def test_gpu_tests() -> None:
    rehearse(ROOT / "tests" / "test_gpu.py", "-k", QUICK, interpret=True)


@pytest.mark.exhaustive
def test_all_gpu_tests_and_launches() -> None:
    rehearse(ROOT / "tests" / "test_gpu.py", interpret=True)
    rehearse(HERE / "pretended_launches.py", HERE / "pretended_compile.py", "-m", "slow")
