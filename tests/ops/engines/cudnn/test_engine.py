"""The engine "cudnn": what it refuses everywhere, and its whole way before pretended GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusedshape import linear_act
from fusedshape.ops.engines import ENGINES, RIVALS
from fusedshape.ops.engines.cudnn import library
from tests.kernels.test_pretend_gpu import rehearse
from tests.support.layers import layer_of
from tests.support.operands import LEAKY

GEOMETRY = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
ENGINE = ENGINES["cudnn"]


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a build of torch without CUDA")
def test_before_pretended_gpus() -> None:
    """Values, gradients, plans in memory and on disk, failures, tuning: see pretended.py."""
    rehearse(Path(__file__).with_name("pretended.py"), interpret=True)


def test_it_is_a_rival_on_cuda_alone() -> None:
    assert [device for device, rivals in RIVALS.items() if ENGINE in rivals] == ["cuda"]
    assert ENGINE.backend is None
    assert not ENGINE.pinned
    assert not ENGINE.prefers(None)  # type: ignore[arg-type]
    assert ENGINE.lenient is not ENGINE
    assert ENGINE.lenient.name == "cudnn"
    assert ENGINE.lenient.lenient is ENGINE.lenient


def test_on_a_cpu_it_says_so_and_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("cudnn was looked for")

    monkeypatch.setattr(library, "why_not", never)
    x = torch.ones(2, 8, 4, 4).to(memory_format=torch.channels_last)
    why = ENGINE.why_not(x, layer_of(torch.ones(8, 8, 3, 3), LEAKY, GEOMETRY))
    assert why == "engine 'cudnn' serves CUDA tensors, got one on cpu"
    with pytest.raises(ValueError, match="cannot run this layer: engine 'cudnn' serves CUDA"):
        linear_act(torch.ones(2, 8), torch.ones(4, 8), None, LEAKY, engine="cudnn")


@pytest.mark.skipif(library.INSTALLED, reason="nvidia-cudnn-frontend is installed")
def test_without_the_package_it_says_how_to_get_it() -> None:
    error = ENGINE.unavailable("cuda")  # type: ignore[attr-defined]
    assert "pip install 'fusedshape[cudnn]'" in str(error)
    assert not ENGINE.considers(torch.ones(2, 8, 4, 4))
