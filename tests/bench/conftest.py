"""The record of the smoke suite, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusedshape.cli import main


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of the smoke suite, made by the command."""
    out = tmp_path_factory.mktemp("bench") / "smoke.json"
    assert main(["bench", "--suite", "smoke", "--out", str(out)]) == 0
    return out
