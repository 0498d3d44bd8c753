"""Across modules: each of examples/ runs, and does what it says."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    return capsys.readouterr().out


def number(pattern: str, text: str) -> float:
    found = re.search(pattern.replace("#", r"([\d.]+(?:e[+-]?\d+)?)"), text)
    assert found, f"{pattern!r} is not in {text!r}"
    return float(found[1])


def test_every_example_has_a_test_and_a_place_in_the_docs() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {name.removeprefix("test_") for name in globals() if name[5:] in names} == names
    page = (EXAMPLES.parent / "docs/examples.md").read_text()
    assert set(re.findall(r"examples/(\w+)\.py", page)) == names


def test_resnet(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("resnet", capsys)
    assert "8 shortcuts removed, 17 layers fused" in out
    assert "theory and measurement agree" in out
    assert number("loss #", out) < 2.3


def test_vanilla_mlp(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    code = (EXAMPLES / "vanilla_mlp.py").read_text().splitlines()
    assert len([line for line in code[1:] if line]) <= 20
    assert number("accuracy #%", printed("vanilla_mlp", capsys)) > 90


def test_third_derivatives(capsys: pytest.CaptureFixture[str]) -> None:
    assert number("error of u #", printed("third_derivatives", capsys)) < 1e-2


def test_export(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's and onnxscript's own making
        out = printed("export", capsys)
    assert "stock modules: AdaptiveAvgPool2d, Conv2d, Flatten, LeakyReLU, Linear\n" in out
    assert number("difference #", out) < 1e-5
    assert number("ONNX: #", out) > 30
