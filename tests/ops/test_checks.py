"""The ops refuse what they cannot compute, in the caller's words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusedshape.ops import bias_act, conv_act, linear_act, shaped_act
from tests.support.backends import INTERPRET
from tests.support.operands import LEAKY

BAD: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (TypeError, "int64", lambda: shaped_act(torch.ones(2, dtype=torch.int64), LEAKY)),
    (TypeError, "complex64", lambda: shaped_act(torch.ones(2, dtype=torch.complex64), LEAKY)),
    (TypeError, "list", lambda: shaped_act([1.0], LEAKY)),
    (TypeError, "must be an ActSpec", lambda: shaped_act(torch.ones(2), "tanh")),
    (
        ValueError,
        "unknown backend 'cuda'",
        lambda: shaped_act(torch.ones(2), LEAKY, backend="cuda"),
    ),
    (IndexError, "dim=3", lambda: bias_act(torch.ones(2, 3), torch.ones(3), LEAKY, dim=3)),
    (ValueError, "pass \\(3,\\)", lambda: bias_act(torch.ones(2, 3), torch.ones(2), LEAKY)),
    (
        ValueError,
        "on meta",
        lambda: bias_act(torch.ones(2, 3), torch.ones(3, device="meta"), LEAKY),
    ),
    (TypeError, "float64", lambda: bias_act(torch.ones(2, 3), torch.ones(3).double(), LEAKY)),
    (
        ValueError,
        "weight has 64 input channels per group, input has 48 and groups=1",
        lambda: conv_act(torch.ones(1, 48, 4, 4), torch.ones(8, 64, 1, 1), None, LEAKY),
    ),
    (
        ValueError,
        "groups=3",
        lambda: conv_act(torch.ones(1, 6, 4, 4), torch.ones(8, 2, 1, 1), None, LEAKY, groups=3),
    ),
    (
        ValueError,
        "reaches over 5",
        lambda: conv_act(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 5, 1), None, LEAKY),
    ),
    (
        ValueError,
        "stride=0",
        lambda: conv_act(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1), None, LEAKY, stride=0),
    ),
    *(
        (
            ValueError,
            f"{name}={value!r} must be an integer of at least",
            lambda name=name, value=value: conv_act(
                torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1), None, LEAKY, **{name: value}
            ),
        )
        for name, value in (("stride", 1.0), ("dilation", None), ("padding", {}))
    ),
    (
        ValueError,
        "padding=-1",
        lambda: conv_act(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1), None, LEAKY, padding=-1),
    ),
    *(
        (
            ValueError,
            f"'{mode}' pads size 3 by {most} at most, got a padding of {most + 1} in spatial dim",
            lambda mode=mode, most=most: conv_act(
                torch.ones(0, 1, 9, 3),
                torch.ones(1, 1, 2, 2),
                None,
                LEAKY,
                padding=(1, most + 1),
                padding_mode=mode,
            ),
        )
        for mode, most in (("reflect", 2), ("circular", 3))
    ),
    *(
        (
            ValueError,
            "has size 0 in spatial dimension 1",
            lambda mode=mode: conv_act(
                torch.ones(1, 1, 4, 0),
                torch.ones(1, 1, 2, 2),
                None,
                LEAKY,
                padding="same",
                padding_mode=mode,
            ),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    (
        ValueError,
        "needs stride 1",
        lambda: conv_act(
            torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1), None, LEAKY, stride=2, padding="same"
        ),
    ),
    (
        ValueError,
        "padding_mode='wrap'",
        lambda: conv_act(
            torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1), None, LEAKY, padding_mode="wrap"
        ),
    ),
    (
        TypeError,
        "weight has dtype torch.float64",
        lambda: conv_act(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1).double(), None, LEAKY),
    ),
    (
        TypeError,
        "x has layout torch._mkldnn; supported are dense",
        lambda: linear_act(torch.eye(4).to_mkldnn(), torch.ones(3, 4), None, LEAKY),
    ),
    (
        TypeError,
        "weight has layout torch.sparse_coo; supported are dense",
        lambda: linear_act(torch.eye(4), torch.eye(4).to_sparse(), None, LEAKY),
    ),
    (
        TypeError,
        "x is nested; supported are dense",
        lambda: shaped_act(
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), LEAKY
        ),
    ),
    (ValueError, "must be 5", lambda: linear_act(torch.ones(2, 4), torch.ones(3, 5), None, LEAKY)),
    (ValueError, "2 dimensions", lambda: linear_act(torch.ones(4), torch.ones(4), None, LEAKY)),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: c[1])
def test_bad_input_is_refused(case: tuple[type[Exception], str, Callable[[], object]]) -> None:
    error, message, call = case
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(INTERPRET, reason="the interpreter serves CPU tensors")
def test_an_explicit_backend_never_falls_back() -> None:
    with pytest.raises(ValueError, match="serves CUDA tensors, got one on cpu"):
        shaped_act(torch.ones(2), LEAKY, backend="triton")
    with pytest.raises(ValueError, match="serves CPU tensors, got one on meta"):
        shaped_act(torch.ones(2, device="meta"), LEAKY, backend="native")
