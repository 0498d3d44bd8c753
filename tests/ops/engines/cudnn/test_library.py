"""Whether cuDNN is there: missing, broken or too old, each said plainly, and not at import."""

from __future__ import annotations

import importlib.machinery
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from fusedshape.ops.engines.cudnn import library
from tests.support import fake_cudnn


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    library.forget()
    yield
    library.forget()


def install(monkeypatch: pytest.MonkeyPatch, **what: Any) -> None:
    """Let `import cudnn` find a module with these attributes."""
    module = types.ModuleType("cudnn")
    module.__spec__ = importlib.machinery.ModuleSpec("cudnn", None)
    module.__dict__.update({"__version__": "1.32.0", **what})
    monkeypatch.setitem(sys.modules, "cudnn", module)


def broken() -> int:
    raise RuntimeError("libcudnn.so.9: cannot open\nshared object file")


@pytest.mark.parametrize(
    ("backend_version", "reason"),
    [
        (fake_cudnn.backend_version, None),
        (lambda: 91900, r"cuDNN 9\.19\.0 is too old; it needs 9\.24\.0 or newer"),
        (broken, r"cannot be loaded \(RuntimeError: libcudnn\.so\.9: cannot open shared object"),
    ],
    ids=["there", "too old", "broken"],
)
def test_why_not(backend_version: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, backend_version=backend_version)
    found = library.why_not()
    if reason is None:
        assert found is None
        assert library.version() == "cuDNN 9.28.0, frontend 1.32.0"
    else:
        assert found is not None
        assert re.search(reason, found)
        assert "\n" not in found


def test_a_module_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise ImportError("libcudart.so.13: no such file")

    install(monkeypatch)
    monkeypatch.setattr(library, "module", fails)
    assert library._why_not.__wrapped__() == (
        "cuDNN cannot be loaded (ImportError: libcudart.so.13: no such file); reinstall it"
    )


def test_nothing_is_imported_before_somebody_asks() -> None:
    code = "import sys, fusedshape; print('cudnn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
