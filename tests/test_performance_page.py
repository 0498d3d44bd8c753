"""Across modules: docs/performance.md says what the records and the operators say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusedshape import native, timing
from fusedshape.bench import cases, suites
from fusedshape.ops import ChainLayer, conv_act, conv_chain
from tests.support.places import ROOT


class Passes(TorchDispatchMode):
    """Counts how often tensors of the activations' size are read and written, as on a GPU.

    There a convolution adds its bias in a pass of its own, and makes each of its gradients by
    itself. Every other operator reads its arguments once, and writes its result once.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.count += 2 if args[2] is None else 4
        elif name == "convolution_backward":
            dgrad, wgrad, bias = args[-1]
            self.count += 2 * dgrad + 2 * wgrad + bias
        elif not func.is_view and name not in ("detach", "empty_like"):
            written = [
                given
                for given, declared in zip(args, func._schema.arguments, strict=False)
                if declared.alias_info is not None and declared.alias_info.is_write
            ]
            results = [out] if isinstance(out, torch.Tensor) else [*(out or ())]
            fresh = [t for t in results if not any(t is given for given in written)]
            for t in (*args, *written, *fresh):
                self.count += isinstance(t, torch.Tensor) and t.numel() == self.size
        return out


#: First words of a line of the page's table, and the provider that it is about.
FORMS = {
    "eager:": "eager",
    "folded:": "inplace",
    "`conv_act` with torch's": "fused aten",
    "`conv_act` with convolutions of ours": "fused native",
    "`conv_chain`": "fused chain native",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_pages_passes_are_those_of_the_operators(form: str) -> None:
    """The passes that one more layer adds, so that the first and the last one do not count."""
    if "native" in FORMS[form] and not native.available():
        pytest.skip("csrc is not built")
    page = (ROOT / "docs/performance.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {form}"))
    stated = [int(cell) for cell in line.split("|")[2:6]]
    spec, shape = replace(cases.spec_of("leaky_relu"), input_scale=1.0), (2, 16, 6)
    size, found = 2 * 16 * 36, []
    for depth in (3, 4):
        x = torch.randn(shape[0], shape[1], 6, 6).to(memory_format=torch.channels_last)
        x.requires_grad_()
        weights = [torch.randn(16, 16, 3, 3, requires_grad=True) for _ in range(depth)]
        biases = [torch.randn(16, requires_grad=True) for _ in range(depth)]
        layers = list(zip(weights, biases, strict=True))

        def run(x: torch.Tensor, layers: Any = layers) -> torch.Tensor:
            provider = FORMS[form]
            if "chain" in provider:
                made = [ChainLayer(w, b, spec, padding=1, engine="native") for w, b in layers]
                return conv_chain(x, made)
            for w, b in layers:
                if provider.startswith("fused"):
                    x = conv_act(x, w, b, spec, padding=1, engine=provider.split()[1])
                else:
                    z = F.conv2d(x, w, b, padding=1)
                    inplace = provider == "inplace"
                    x = F.leaky_relu(z, spec.negative_slope, inplace=inplace)
                    x = x if inplace else spec.output_scale * x
            return x

        with Passes(size) as forward:
            y = run(x)
        with Passes(size) as backward:
            torch.autograd.grad(y, [x, *weights, *biases], torch.ones_like(y))
        saved = timing.saved_bytes(lambda: run(x), [x, *weights, *biases])  # noqa: B023
        found.append((forward.count, backward.count, saved // (4 * size)))
    ahead, back, kept = (more - few for few, more in zip(*found, strict=True))
    assert [ahead, back, ahead + back, kept] == stated


def test_performance_page_is_that_of_the_records() -> None:
    from bench.tables import written

    page = (ROOT / "docs/performance.md").read_text()
    assert written(page, "docs/performance.md") == page, "run: python -m bench.tables"


def test_performance_page_names_commands_that_exist() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    for line in page.splitlines():
        words = line.split("#")[0].split()
        if words[:2] == ["fusedshape", "bench"] and "--suite" in words:
            assert words[words.index("--suite") + 1] in suites.SUITES
