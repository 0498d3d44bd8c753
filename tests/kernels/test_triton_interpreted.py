"""Across modules: runs interpreted*.py, each in a process of its own.

Triton reads TRITON_INTERPRET when it is first imported, and torch may have imported it long before
any test runs; hence one child, whatever the process of this test is like.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("interpreted*.py")))
def test_interpreted(file: str) -> None:
    command = [sys.executable, "-m", "pytest", HERE / file, "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--color=no"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    child = subprocess.run(
        command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True
    )
    if child.returncode != 0 or "skipped" in child.stdout:
        pytest.fail(child.stdout + child.stderr, pytrace=False)
