"""The one table of activations: what each computes, what kernels need, and what torch calls it.

Everything else (reference, theory, Triton, csrc, convert, fold, diagnose) looks up the rows of
`ACTIVATIONS`. φ and its derivatives are written in torch operations, so that they serve any dtype
and device and can be differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape.validate import shown

Phi = Callable[[Tensor, float], Tensor]

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717
GELU_CUBIC = 0.044715


@dataclass(frozen=True)
class TorchName:
    """A name under which torch knows an activation, and what its arguments mean.

    Attributes:
        name: of the function in torch.nn.functional, of the method and of the aten operator.
        module: the class in torch.nn; its attributes are the function's arguments.
        options: the function's arguments after the tensor, in order, with their defaults.
        constants: called with the options by name, the constants of the `ActSpec` that computes the
            same; None where no constants do.
        fixed: it is a function of its input alone; False if it has weights or draws numbers.
    """

    name: str
    module: type[nn.Module] | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    constants: Callable[..., dict[str, Any] | None] = lambda: {}
    fixed: bool = True


@dataclass(frozen=True)
class Activation:
    """One scalar function φ and what the kernels, the theory and tools must know of it.

    Attributes:
        name: the field's name for φ, as in the `dks` package.
        value: φ(u, negative_slope).
        d1: φ′(u, negative_slope); at a kink, the left derivative. There, at ±inf and at NaN, value
            and d1 are torch's where it has the function, else limits.
        d2: φ″(u, negative_slope) where it exists (point masses at kinks are left out).
        saves: which tensor backward needs: "output" when φ′ is a cheap function of φ, else "input".
        d1_from_output: φ′ as a function of v = φ(u); None when `saves` is "input".
        kinks: points where φ, φ′ or φ″ is not continuous; quadrature splits there.
        has_slope: whether `negative_slope` means anything to φ.
        homogeneous: φ(cu) = c·φ(u) for c > 0.
        smooth: φ′ is continuous, so that C″(1) is finite.
        exported: φ, to rounding, in operators of the older ONNX exporter; None where `value` is.
        registers: how many a Triton kernel needs to compute φ and φ′. "few": about as many as
            for no activation; "many": the pointwise kernels spill unless they are given a limit;
            "most": products spill too.
        names: what torch calls φ, by itself or with constants.
        module: makes torch's module for a negative_slope; None if it has none.
        function: φ(u, negative_slope) in the functions one would write without this library; a
            model that `fusedshape.fold` makes contains them where there is no module.
        id: the number by which kernels know φ: its position in the table.
    """

    name: str
    value: Phi
    d1: Phi
    d2: Phi
    saves: Literal["output", "input"]
    d1_from_output: Phi | None = None
    kinks: tuple[float, ...] = ()
    has_slope: bool = False
    homogeneous: bool = False
    smooth: bool = True
    exported: Phi | None = None
    registers: Literal["few", "some", "many", "most"] = "some"
    names: tuple[TorchName, ...] = ()
    module: Callable[[float], nn.Module] | None = None
    function: Phi | None = None
    id: int = -1


def _exp_neg(u: Tensor) -> Tensor:
    # Clamped, so that autograd never multiplies 0 by inf in the branch that `where` discards.
    return u.clamp(max=0).exp()


# Written with torch's own backward functions, whose derivative is zeros. A comparison has none, so
# that a gradient penalty would leave biases without a gradient.
def _relu_d1_from_output(v: Tensor, a: float) -> Tensor:
    return torch.ops.aten.threshold_backward.default(torch.ones_like(v), v, 0)


def _leaky_d1(u: Tensor, a: float) -> Tensor:
    return torch.ops.aten.leaky_relu_backward.default(torch.ones_like(u), u, a, False)


def _undefined(u: Tensor) -> Tensor:
    # 0, but NaN at ±inf, where torch's own backward computes inf·0.
    return u.detach() - u.detach()


def _softplus(u: Tensor, a: float) -> Tensor:
    # F.softplus is linear beyond its threshold, an error of 2e-9 that the solver would notice.
    return torch.logaddexp(u, torch.zeros_like(u))


def _softplus_exported(u: Tensor, a: float) -> Tensor:
    return u.relu() + (-u.abs()).exp().log1p()


def _asinh_exported(u: Tensor, a: float) -> Tensor:
    s = u.abs()
    t = s.clamp(max=1e9)  # beyond that, the square may overflow, and the root equals s
    return u.sign() * (
        (t + (t.square() + 1).sqrt()).log() + (s / t.clamp(min=1)).clamp(min=1).log()
    )


def _sech2(u: Tensor) -> Tensor:
    return 1 - u.tanh().square()


def _logistic_d1(u: Tensor) -> Tensor:
    s = u.sigmoid()
    return s * (1 - s)


def _swish_d1(u: Tensor, a: float) -> Tensor:
    s = u.sigmoid()
    return s * (1 + u * (1 - s))


def _swish_d2(u: Tensor, a: float) -> Tensor:
    s = u.sigmoid()
    return s * (1 - s) * (2 + u * (1 - 2 * s))


def _bounded(u: Tensor) -> Tensor:
    # At ±64 tanh has reached its limits, and no power overflows. ±inf stays: NaN as in torch.
    return torch.where(u.isinf(), u, u.clamp(-64, 64))


def _gelu_inner(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k = math.sqrt(2 / math.pi)
    u = _bounded(u)
    u2 = u.square()
    return (
        k * u * (1 + GELU_CUBIC * u2),
        k * (1 + 3 * GELU_CUBIC * u2),
        6 * k * GELU_CUBIC * u,
    )


def _gelu(u: Tensor, a: float) -> Tensor:
    w, _, _ = _gelu_inner(u)
    return 0.5 * u * (1 + w.tanh())


def _gelu_d1(u: Tensor, a: float) -> Tensor:
    w, w1, _ = _gelu_inner(u)
    t = w.tanh()
    return 0.5 * (1 + t) + 0.5 * _bounded(u) * (1 - t * t) * w1


def _gelu_d2(u: Tensor, a: float) -> Tensor:
    w, w1, w2 = _gelu_inner(u)
    t = w.tanh()
    s = 1 - t * t
    return s * w1 + 0.5 * _bounded(u) * s * (w2 - 2 * t * w1 * w1)


def _normal_cdf(u: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-u * math.sqrt(0.5))


def _normal_pdf(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


def _far(u: Tensor) -> Tensor:
    # At ±2⁶⁰, √(u² + 1) equals |u|, and u² does not overflow.
    return u.clamp(-(2.0**60), 2.0**60)


def _bentid(u: Tensor, a: float) -> Tensor:
    # √(u² + 1) − 1 is written as u²/(1 + √(u² + 1)), which does not cancel; for large u it is |u|.
    square = u.masked_fill(u.abs() > 2.0**60, 0.0).square()
    near = u + 0.5 * square / (1 + (square + 1).sqrt())
    return torch.where(u.abs() > 2.0**60, torch.where(u < 0, 0.5 * u, 1.5 * u), near)


def _of_prelu(weight: Any) -> dict[str, Any] | None:
    # An ActSpec has one slope, so that of all channels must be the same.
    if not isinstance(weight, Tensor) or weight.min() != weight.max():
        return None
    return {"negative_slope": weight.flatten()[0].item()}


_ROWS = (
    Activation(
        "relu",
        value=lambda u, a: u.relu(),
        d1=lambda u, a: _relu_d1_from_output(u.relu(), a),
        d2=lambda u, a: torch.zeros_like(u),
        saves="output",
        d1_from_output=_relu_d1_from_output,
        kinks=(0.0,),
        homogeneous=True,
        smooth=False,
        registers="few",
        names=(TorchName("relu", nn.ReLU),),
        module=lambda a: nn.ReLU(),
        function=lambda u, a: F.relu(u),
    ),
    Activation(
        "leaky_relu",
        value=F.leaky_relu,
        d1=_leaky_d1,
        d2=lambda u, a: torch.zeros_like(u),
        saves="output",
        d1_from_output=_leaky_d1,
        kinks=(0.0,),
        has_slope=True,
        homogeneous=True,
        smooth=False,
        registers="few",
        names=(
            TorchName(
                "leaky_relu",
                nn.LeakyReLU,
                {"negative_slope": 0.01},
                lambda negative_slope: {"negative_slope": negative_slope},
            ),
            TorchName("prelu", nn.PReLU, {"weight": None}, _of_prelu, fixed=False),
        ),
        module=nn.LeakyReLU,
        function=F.leaky_relu,
    ),
    Activation(
        "tanh",
        value=lambda u, a: u.tanh(),
        d1=lambda u, a: _sech2(u),
        d2=lambda u, a: -2 * u.tanh() * _sech2(u),
        saves="output",
        d1_from_output=lambda v, a: (1 - v * v).clamp(min=0),
        names=(TorchName("tanh", nn.Tanh),),
        module=lambda a: nn.Tanh(),
        function=lambda u, a: torch.tanh(u),
    ),
    Activation(
        "sigmoid",
        value=lambda u, a: u.sigmoid(),
        d1=lambda u, a: _logistic_d1(u),
        d2=lambda u, a: _logistic_d1(u) * (1 - 2 * u.sigmoid()),
        saves="output",
        d1_from_output=lambda v, a: (v * (1 - v)).clamp(min=0),
        names=(TorchName("sigmoid", nn.Sigmoid), TorchName("special_expit")),
        module=lambda a: nn.Sigmoid(),
        function=lambda u, a: torch.sigmoid(u),
    ),
    Activation(
        "softplus",
        value=_softplus,
        d1=lambda u, a: u.sigmoid(),
        d2=lambda u, a: _logistic_d1(u),
        saves="output",
        d1_from_output=lambda v, a: -torch.expm1(-v.clamp(min=0)),
        exported=_softplus_exported,
        names=(
            TorchName(
                "softplus",
                nn.Softplus,
                {"beta": 1.0},
                lambda beta: {"input_scale": beta, "output_scale": 1 / beta},
            ),
        ),
        # Beyond its threshold torch returns u itself; at 40 float64 cannot tell the difference.
        module=lambda a: nn.Softplus(threshold=40.0),
        function=lambda u, a: F.softplus(u),
    ),
    Activation(
        "elu",
        value=lambda u, a: F.elu(u),
        d1=lambda u, a: torch.where(u <= 0, _exp_neg(u), 1.0),
        d2=lambda u, a: torch.where(u > 0, 0.0, _exp_neg(u)),
        saves="output",
        d1_from_output=lambda v, a: torch.where(v <= 0, (v + 1).clamp(min=0), 1.0),
        kinks=(0.0,),
        names=(
            TorchName("elu", nn.ELU, {"alpha": 1.0}, lambda alpha: {} if alpha == 1 else None),
            TorchName(
                "celu",
                nn.CELU,
                {"alpha": 1.0},
                lambda alpha: {"input_scale": 1 / alpha, "output_scale": alpha},
            ),
        ),
        module=lambda a: nn.ELU(),
        function=lambda u, a: F.elu(u),
    ),
    Activation(
        "selu",
        value=lambda u, a: F.selu(u),
        d1=lambda u, a: SELU_SCALE * torch.where(u <= 0, SELU_ALPHA * _exp_neg(u), 1.0),
        d2=lambda u, a: SELU_SCALE * torch.where(u > 0, 0.0, SELU_ALPHA * _exp_neg(u)),
        saves="output",
        d1_from_output=lambda v, a: torch.where(
            v <= 0, (v + SELU_SCALE * SELU_ALPHA).clamp(min=0), SELU_SCALE
        ),
        kinks=(0.0,),
        smooth=False,
        names=(TorchName("selu", nn.SELU),),
        module=lambda a: nn.SELU(),
        function=lambda u, a: F.selu(u),
    ),
    Activation(
        "softsign",
        value=lambda u, a: u / (1 + u.abs()),
        d1=lambda u, a: (1 + u.abs()).square().reciprocal() + _undefined(u),
        d2=lambda u, a: -2 * u.sign() * (1 + u.abs()).pow(-3),
        saves="output",
        d1_from_output=lambda v, a: (1 - v.abs()).square(),
        kinks=(0.0,),
        names=(TorchName("softsign", nn.Softsign),),
        module=lambda a: nn.Softsign(),
        function=lambda u, a: F.softsign(u),
    ),
    Activation(
        "atan",
        value=lambda u, a: u.atan(),
        d1=lambda u, a: (1 + u * u).reciprocal(),
        d2=lambda u, a: -2 * u / (1 + u * u).square(),
        saves="output",
        d1_from_output=lambda v, a: v.cos().square(),
        registers="many",
        names=(TorchName("atan"), TorchName("arctan")),
        function=lambda u, a: torch.atan(u),
    ),
    Activation(
        "asinh",
        value=lambda u, a: u.asinh(),
        d1=lambda u, a: (1 + u * u).rsqrt(),
        d2=lambda u, a: -u * (1 + u * u).pow(-1.5),
        saves="output",
        d1_from_output=lambda v, a: v.cosh().reciprocal(),
        exported=_asinh_exported,
        names=(TorchName("asinh"), TorchName("arcsinh")),
        function=lambda u, a: torch.asinh(u),
    ),
    Activation(
        "swish",
        value=lambda u, a: u * u.sigmoid(),
        d1=_swish_d1,
        d2=_swish_d2,
        saves="input",
        registers="many",
        names=(TorchName("silu", nn.SiLU),),
        module=lambda a: nn.SiLU(),
        function=lambda u, a: F.silu(u),
    ),
    Activation(
        "gelu",
        value=_gelu,
        d1=_gelu_d1,
        d2=_gelu_d2,
        saves="input",
        names=(
            TorchName(
                "gelu",
                nn.GELU,
                {"approximate": "none"},
                lambda approximate: {} if approximate == "tanh" else None,
            ),
        ),
        module=lambda a: nn.GELU(approximate="tanh"),
        function=lambda u, a: F.gelu(u, approximate="tanh"),
    ),
    Activation(
        "gelu_exact",
        value=lambda u, a: u * _normal_cdf(u),
        d1=lambda u, a: _normal_cdf(u) + u * _normal_pdf(u),
        d2=lambda u, a: _normal_pdf(u) * (2 - u * u),
        saves="input",
        exported=lambda u, a: u * (0.5 * (1 + torch.erf(u * math.sqrt(0.5)))),
        names=(
            TorchName(
                "gelu",
                nn.GELU,
                {"approximate": "none"},
                lambda approximate: None if approximate == "tanh" else {},
            ),
        ),
        module=lambda a: nn.GELU(),
        function=lambda u, a: F.gelu(u),
    ),
    Activation(
        "erf",
        value=lambda u, a: u.erf(),
        d1=lambda u, a: 2 / math.sqrt(math.pi) * torch.exp(-u * u),
        d2=lambda u, a: -4 / math.sqrt(math.pi) * u * torch.exp(-u * u),
        saves="input",
        names=(TorchName("erf"), TorchName("special_erf")),
        function=lambda u, a: torch.erf(u),
    ),
    Activation(
        "bentid",
        value=_bentid,
        d1=lambda u, a: 0.5 * _far(u) * (_far(u).square() + 1).rsqrt() + 1,
        d2=lambda u, a: 0.5 * (u * u + 1).pow(-1.5),
        saves="input",
        registers="many",
        function=lambda u, a: 0.5 * (torch.sqrt(torch.square(u) + 1) - 1) + u,
    ),
    Activation(
        "square",
        value=lambda u, a: u * u,
        d1=lambda u, a: 2 * u,
        d2=lambda u, a: torch.full_like(u, 2.0),
        saves="input",
        registers="many",
        names=(TorchName("square"),),
        function=lambda u, a: torch.square(u),
    ),
    Activation(
        "sin",
        value=lambda u, a: u.sin(),
        d1=lambda u, a: u.cos(),
        d2=lambda u, a: -u.sin(),
        saves="input",
        registers="most",
        names=(TorchName("sin"),),
        function=lambda u, a: torch.sin(u),
    ),
    Activation(
        "cos",
        value=lambda u, a: u.cos(),
        d1=lambda u, a: -u.sin(),
        d2=lambda u, a: -u.cos(),
        saves="input",
        registers="most",
        names=(TorchName("cos"),),
        function=lambda u, a: torch.cos(u),
    ),
)

ACTIVATIONS: dict[str, Activation] = {
    row.name: replace(row, id=position) for position, row in enumerate(_ROWS)
}

# Those of torch's activations that no row computes. A class stands before the one it derives from.
_OF_NO_ROW = (
    TorchName("rrelu", nn.RReLU, fixed=False),
    TorchName("relu6", nn.ReLU6),
    TorchName("mish", nn.Mish),
    TorchName("hardtanh", nn.Hardtanh),
    TorchName("hardswish", nn.Hardswish),
    TorchName("hardsigmoid", nn.Hardsigmoid),
    TorchName("hardshrink", nn.Hardshrink),
    TorchName("softshrink", nn.Softshrink),
    TorchName("tanhshrink", nn.Tanhshrink),
    TorchName("logsigmoid", nn.LogSigmoid),
    TorchName("threshold", nn.Threshold),
)

#: Everything that torch calls an activation, whether a row computes it or not.
TORCH_NAMES: tuple[TorchName, ...] = (
    *(known for row in ACTIVATIONS.values() for known in row.names),
    *_OF_NO_ROW,
)


def get_activation(name: str, who: str = "get_activation") -> Activation:
    """Look up a row of the table by its name.

    Args:
        name: one of the keys of `ACTIVATIONS`.
        who: whose argument it is, for the message.

    Returns:
        The row.

    Raises:
        ValueError: no such activation; the message lists those there are.

    Example:
        >>> get_activation("tanh").saves
        'output'
    """
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"{who}: unknown activation {shown(name)}; known: {known}") from None


def ids_by_registers(*registers: str) -> tuple[int, ...]:
    """The ids of the rows whose `Activation.registers` is one of those given.

    Example:
        >>> ids_by_registers("few") == tuple(ACTIVATIONS[n].id for n in ("relu", "leaky_relu"))
        True
    """
    return tuple(row.id for row in ACTIVATIONS.values() if row.registers in registers)


def options_of(name: str) -> Mapping[str, Any]:
    """The arguments of one of torch's activations after the tensor, in order, with their defaults.

    Example:
        >>> options_of("elu"), options_of("tanh")
        ({'alpha': 1.0}, {})
    """
    return next((known.options for known in TORCH_NAMES if known.name == name), {})
