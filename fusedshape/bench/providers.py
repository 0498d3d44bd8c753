"""The ways to run a layer or a network that are compared, as candidates to be timed.

bare         the layer and its bias without an activation: a lower bound of the time
eager        γ(φ(α(z + b) + β) + δ), one torch operation after the other
folded       γ multiplied into weight and bias, then a stock activation; only where this is exact
inplace      folded with the activation in place: one saved tensor, as in InPlace-ABN
compiled     torch.compile of eager
reference    this library in plain PyTorch, which takes φ′ from the output
fused        this library with its own choice of backend and engine; "fused NAME" names the engine
fused chain  the layers of a chain as one node (conv_chain); for a net, convert(model, chain=True)
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape.convert import convert
from fusedshape.kernels import roofline
from fusedshape.kernels.roofline import Traffic, traffic
from fusedshape.kinds import kind_of
from fusedshape.ops import bias_act, conv_act, linear_act, shaped_act
from fusedshape.ops.chain import ChainLayer, conv_chain
from fusedshape.reference import own_weight
from fusedshape.spec import ActSpec
from fusedshape.timing import Candidate

#: Relative error of gradients that is explained by layers on the other side of a kink.
EITHER_BRANCH = 0.01

Mode = Literal["forward", "backward", "step"]
Leaves = dict[str, Tensor]
#: A function from the leaves, by name, to the output.
Form = Callable[..., Tensor]
Activate = Callable[[Tensor], Tensor]
#: Providers made by torch.compile, and the mode that they pass to it.
COMPILED = {"compiled": "default", "compiled max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class How:
    """How a problem is built and run.

    Attributes:
        seed: seed of all random numbers.
        device: device of the tensors.
        dtype: dtype of the tensors.
        channels_last: whether tensors of four dimensions are laid out channels last.
        mode: what is timed.
        compiled: names of `COMPILED` to add.
    """

    seed: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    mode: Mode = "step"
    compiled: tuple[str, ...] = ()

    def randn(self, *shape: int, offset: int = 0) -> Tensor:
        """Standard normal numbers, the same in every run; another offset draws others."""
        generator = torch.Generator(self.device).manual_seed(self.seed + offset)
        x = torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
        if self.channels_last and x.ndim == 4:
            return x.to(memory_format=torch.channels_last)
        return x


def stock(z: Tensor, spec: ActSpec) -> Tensor:
    """The activation as one writes it without this library, without operations that do nothing."""
    if spec.input_scale != 1:
        z = spec.input_scale * z
    if spec.input_shift != 0:
        z = z + spec.input_shift
    y = (spec.row.function or spec.row.value)(z, spec.negative_slope)
    if spec.output_shift != 0:
        y = y + spec.output_shift
    return spec.output_scale * y if spec.output_scale != 1 else y


@dataclass(frozen=True)
class Task:
    """One thing to compute, and all candidates that compute it.

    Attributes:
        candidates: the candidates by name.
        truth: makes the tensors of `Candidate.check` in float64; None if nothing is checked.
        dtype: dtype of the tensors; decides which measured matmul rate is the ceiling.
        bytes: bytes that any implementation has to move.
        flops: FLOPs of convolutions and products.
        leaves: inputs and parameters, which do not count as memory of a candidate.
        tolerance: a relative error up to this is always allowed.
    """

    candidates: dict[str, Candidate]
    truth: Callable[[], Leaves] | None = None
    dtype: torch.dtype = torch.float32
    bytes: int | None = None
    flops: int | None = None
    leaves: Sequence[Tensor] = ()
    tolerance: float = 0.0


@dataclass(frozen=True)
class Work:
    """One or several layers that are run in every form.

    Attributes:
        spec: the activation.
        leaves: the tensors to differentiate by, by name.
        compose: makes, from an activation z → y, the form that runs the plain layers with it.
        fused: the forms of this library, by name.
        traffic: bytes and FLOPs of the forward and of the backward pass.
        folds: whether γ can be multiplied into the leaf of that name.
        layers: number of layers with a product. For a single one, the incoming gradient is zero
            where rounding decides on which side of a kink the pre-activation is; with several,
            candidates may take different sides.
    """

    spec: ActSpec
    leaves: Leaves
    compose: Callable[[Activate], Form]
    fused: dict[str, Form]
    traffic: tuple[Traffic, Traffic]
    folds: Callable[[str], bool] = lambda name: name != "x"
    layers: int = 1

    def problem(self, how: How) -> Task:
        """The problem, with a candidate from every provider."""
        spec, leaves, mode = self.spec, self.leaves, how.mode
        bare, eager = self.compose(lambda z: z), self.compose(lambda z: stock(z, spec))
        with torch.no_grad():
            z = bare(**leaves)
            grad = randn_like(z, how.seed + 1)
            if self.layers == 1:
                grad[_undecided(z, spec)] = 0

        found = {"bare": replace(_candidate(bare, leaves, grad, mode), check=None)}
        for name, form in self.fused.items():
            found[name] = _candidate(form, leaves, grad, mode, claims=name != "reference")
        found["eager"] = _candidate(eager, leaves, grad, mode, yardstick=True)
        folded: Leaves = {}
        if spec.foldable:
            scales = {name: spec.output_scale if self.folds(name) else 1.0 for name in leaves}
            folded = {
                name: (leaf.detach() * scales[name]).requires_grad_(leaf.requires_grad)
                for name, leaf in leaves.items()
            }
            for name, inplace in (("folded", False), ("inplace", True)):
                leaky = partial(F.leaky_relu, negative_slope=spec.negative_slope, inplace=inplace)
                form = self.compose(leaky)
                found[name] = _scaled(_candidate(form, folded, grad, mode), scales)
        for name in how.compiled:
            form = torch.compile(eager, fullgraph=True, mode=COMPILED[name])
            found[name] = _candidate(form, leaves, grad, mode, compiled=True)

        def truth() -> Leaves:
            double = {
                name: leaf.detach().double().requires_grad_(leaf.requires_grad)
                for name, leaf in leaves.items()
            }
            return _step(eager, double, grad.double())

        forward, backward = self.traffic
        return Task(
            found,
            truth,
            leaves["x"].dtype,
            (forward.bytes if mode != "backward" else 0)
            + (backward.bytes if mode != "forward" else 0),
            (forward.flops if mode != "backward" else 0)
            + (backward.flops if mode != "forward" else 0),
            (*leaves.values(), *folded.values()),
            tolerance=EITHER_BRANCH if self.layers > 1 else 0.0,
        )


def _undecided(z: Tensor, spec: ActSpec) -> Tensor:
    """Where z is so near a kink that the rounding of the product decides on which side it is.

    The margin allows for rounded weights in 16 bits, and for tf32 where a GPU computes float32.
    """
    u = spec.input_scale * z.float() + spec.input_shift
    rounding = torch.finfo(z.dtype).eps
    if z.is_cuda and z.dtype == torch.float32:
        rounding = 2.0**-10
    margin = max(4 * rounding, 4e-6) * float(u.square().mean().sqrt())
    near = torch.zeros_like(u, dtype=torch.bool)
    for kink in spec.row.kinks:
        near |= (u - kink).abs() < margin
    return near


def _step(form: Form, leaves: Leaves, grad: Tensor) -> Leaves:
    y = form(**leaves)
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], grad)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}}


def _candidate(form: Form, leaves: Leaves, grad: Tensor, mode: Mode, **marks: Any) -> Candidate:
    """`form` as a candidate; `marks` are fields of `Candidate`."""
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, wanted, grad)

    made = Candidate(lambda _: form(**leaves), check=lambda: _step(form, leaves, grad), **marks)
    return _in_mode(mode, made, backward)


def _scaled(candidate: Candidate, scales: Mapping[str, float]) -> Candidate:
    """A candidate whose leaves were multiplied by these, checked by the plain ones' gradients."""
    found = candidate.check
    assert found is not None

    def check() -> Leaves:
        return {key: t * scales.get(key[1:], 1.0) for key, t in found().items()}

    return replace(candidate, check=check)


def _in_mode(mode: Mode, forward: Candidate, backward: Callable[[Any], Any]) -> Candidate:
    """A candidate that runs forward as one that runs what the mode says."""
    run = forward.run
    graph = None if forward.compiled else partial(run, None)
    if mode == "forward":
        return replace(forward, graph=graph)
    if mode == "backward":
        return replace(forward, graph=graph, prepare=partial(run, None), run=backward)
    return replace(forward, graph=graph, run=lambda _: backward(run(None)))


def randn_like(x: Tensor, seed: int) -> Tensor:
    """Standard normal numbers with x's shape, strides, dtype and device."""
    return torch.empty_like(x).copy_(How(seed, x.device).randn(*x.shape))


def asked(op: Callable[..., Any], device: torch.device) -> dict[str, dict[str, Any]]:
    """Providers of this library for `op`, with the arguments that select them."""
    found: dict[str, dict[str, Any]] = {"fused": {}, "reference": {"backend": "reference"}}
    if "engine" in inspect.signature(op).parameters:
        # Engine "native" cannot run every case on the CPU.
        engines = ("aten", "triton") if device.type == "cuda" else ("aten",)
        found |= {f"fused {engine}": {"engine": engine} for engine in engines}
    return found


def pointwise(spec: ActSpec, shape: Sequence[int], how: How) -> Task:
    """Bias and activation of a given tensor."""
    x = how.randn(*shape).requires_grad_()
    view = (-1, *[1] * (x.ndim - 2))

    def compose(act: Activate) -> Form:
        return lambda x, bias: act(x + bias.view(view))

    fused = {
        name: lambda x, bias, ask=ask: bias_act(x, bias, spec, **ask)
        for name, ask in asked(bias_act, x.device).items()
    }
    size = x.numel() * x.element_size()
    return Work(
        spec,
        {"x": x, "bias": _bias(shape[1], how)},
        compose,
        fused,
        (Traffic(2 * size, 0), Traffic(3 * size, 0)),
        folds=lambda name: True,
        layers=0,
    ).problem(how)


def accuracy(spec: ActSpec, scale: float, residual_weight: float | None, how: How) -> Task:
    """Errors of the activation alone, or of a 1×1 convolution with a residual added before it.

    Args:
        spec: the activation.
        scale: standard deviation of the input, and of the residual.
        residual_weight: w of the residual; None for the activation alone.
        how: how it is built and run.
    """
    x = (scale * how.randn(64, 32, 8, 8)).requires_grad_()
    if residual_weight is None:
        forms: dict[str, Form] = {
            "fused": lambda x: shaped_act(x, spec),
            "eager": lambda x: stock(x, spec),
        }
        return _in_both_forms(forms, {"x": x}, randn_like(x, how.seed + 1))
    w, own = residual_weight, own_weight(residual_weight)
    residual = (scale * randn_like(x, how.seed + 2)).requires_grad_()

    def joined(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return own * F.conv2d(x, weight, bias) + w * residual

    forms = {
        "fused": lambda residual, **layer: conv_act(
            **layer, spec=spec, residual=residual, residual_weight=w
        ),
        "eager": lambda **leaves: stock(joined(**leaves), spec),
    }
    leaves = {"x": x, **_weights(32, 32, 1, "", how), "residual": residual}
    grad = randn_like(x, how.seed + 1)
    with torch.no_grad():
        grad[_undecided(joined(**leaves), spec)] = 0
    return _in_both_forms(forms, leaves, grad)


def _in_both_forms(forms: Mapping[str, Form], leaves: Leaves, grad: Tensor) -> Task:
    """This library's form and the eager one, whose errors are reported without a limit.

    In the tails the errors of the eager form are as large as the numbers themselves; tests demand
    that ours are no larger.
    """
    found = {
        name: _candidate(form, leaves, grad, "step", claims=name == "fused")
        for name, form in forms.items()
    }

    def truth() -> Leaves:
        double = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        return _step(forms["eager"], double, grad.double())

    return Task(found, truth, grad.dtype, tolerance=math.inf)


def convolution(spec: ActSpec, shape: Sequence[int], batch: int, how: How) -> Task:
    """A convolution and its activation.

    Args:
        spec: the activation.
        shape: input channels, output channels, kernel, stride, input height and width.
        batch: images.
        how: how it is built and run.
    """
    cin, cout, k, stride, size = shape
    # The first layer of a network needs no gradient of its input.
    x = how.randn(batch, cin, size, size).requires_grad_(cin != 3)
    geometry: dict[str, Any] = {"stride": stride, "padding": k // 2}

    def compose(act: Activate) -> Form:
        return lambda x, weight, bias: act(F.conv2d(x, weight, bias, **geometry))

    fused = {
        name: lambda x, weight, bias, ask=ask: conv_act(x, weight, bias, spec, **geometry, **ask)
        for name, ask in asked(conv_act, x.device).items()
    }
    layer = roofline.Convolution(
        batch,
        cin,
        size,
        size,
        cout,
        (k, k),
        (stride, stride),
        (k // 2, k // 2),
        arithmetic=_arithmetic(x.dtype),
    )
    return Work(
        spec,
        {"x": x, **_weights(cout, cin, k, "", how)},
        compose,
        fused,
        _conv_traffic(layer, x.requires_grad),
    ).problem(how)


def linear(spec: ActSpec, shape: Sequence[int], how: How) -> Task:
    """A linear layer and its activation; shape is rows, input features, output features."""
    rows, inner, outer = shape
    x = how.randn(rows, inner).requires_grad_()

    def compose(act: Activate) -> Form:
        return lambda x, weight, bias: act(F.linear(x, weight, bias))

    fused = {
        name: lambda x, weight, bias, ask=ask: linear_act(x, weight, bias, spec, **ask)
        for name, ask in asked(linear_act, x.device).items()
    }
    layer = roofline.Convolution(
        rows, inner, 1, 1, outer, (1, 1), padding=(0, 0), arithmetic=_arithmetic(x.dtype)
    )
    weight = _weights(outer, inner, 1, "", how)
    weight["weight"] = weight["weight"].detach().reshape(outer, inner).requires_grad_()
    leaves = {"x": x, **weight}
    work = Work(spec, leaves, compose, fused, _conv_traffic(layer, True))
    return work.problem(how)


def chain(spec: ActSpec, depth: int, shape: Sequence[int], how: How) -> Task:
    """`depth` equal 3×3 convolutions with their activations; shape is batch, channels, size."""
    batch, channels, size = shape
    x = how.randn(batch, channels, size, size).requires_grad_()
    leaves = {"x": x}
    for i in range(depth):
        own = replace(how, seed=how.seed + 100 * (i + 1))
        leaves |= _weights(channels, channels, 3, str(i), own)

    def stack(layer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Form:
        def form(x: Tensor, **leaves: Tensor) -> Tensor:
            for i in range(depth):
                x = layer(x, leaves[f"weight{i}"], leaves[f"bias{i}"])
            return x

        return form

    def compose(act: Activate) -> Form:
        return stack(lambda x, weight, bias: act(F.conv2d(x, weight, bias, padding=1)))

    def by_layer(ask: dict[str, Any]) -> Form:
        return stack(lambda x, w, b: conv_act(x, w, b, spec, padding=1, **ask))

    def one_node(ask: dict[str, Any]) -> Form:
        def form(x: Tensor, **leaves: Tensor) -> Tensor:
            pairs = [(leaves[f"weight{i}"], leaves[f"bias{i}"]) for i in range(depth)]
            return conv_chain(x, [ChainLayer(w, b, spec, padding=1, **ask) for w, b in pairs])

        return form

    ways = asked(conv_act, x.device)
    fused = {name: by_layer(ask) for name, ask in ways.items()}
    ways.pop("reference")
    fused |= {name.replace("fused", "fused chain"): one_node(ask) for name, ask in ways.items()}
    layer = roofline.Convolution(
        batch, channels, size, size, channels, arithmetic=_arithmetic(x.dtype)
    )
    forward, backward = _conv_traffic(layer, True)
    total = (
        Traffic(depth * forward.bytes, depth * forward.flops),
        Traffic(depth * backward.bytes, depth * backward.flops),
    )
    work = Work(spec, leaves, compose, fused, total, layers=depth)
    return work.problem(how)


@dataclass
class _Net:
    """A model in one form, whose backward pass computes the gradients of all parameters."""

    model: nn.Module
    x: Tensor
    grad: Tensor
    scale: dict[str, float] = field(default_factory=dict)

    def forward(self, _: object = None) -> Tensor:
        return self.model(self.x)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(self.model.parameters()), self.grad)

    def check(self) -> Leaves:
        y = self.forward()
        found = {"y": y.detach()}
        # By parameter: a norm over all of them would hide the missing gradient of a bias.
        for (name, _), gradient in zip(
            self.model.named_parameters(), self.backward(y), strict=True
        ):
            name = name.removeprefix("_orig_mod.")  # the prefix that torch.compile adds
            found[f"d{name}"] = gradient * self.scale.get(name, 1.0)
        return found

    def candidate(self, mode: Mode, **marks: Any) -> Candidate:
        return _in_mode(mode, Candidate(self.forward, check=self.check, **marks), self.backward)


class _Stock(nn.Module):
    def __init__(self, spec: ActSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        return stock(x, self.spec)


def network(build: Callable[[], nn.Sequential], shape: Sequence[int], how: How) -> Task:
    """A net of plain layers and nn.ReLU, shaped by TAT, with the gradients of all parameters.

    Args:
        build: makes the net.
        shape: shape of its input.
        how: how it is built and run; whole nets replay CUDA graphs under max-autotune.
    """
    plain = build()
    fused = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(how.seed)
    spec = convert(fused, method="TAT", activation="leaky_relu", generator=generator).spec
    assert isinstance(spec, ActSpec)
    plain.load_state_dict(fused.state_dict())
    chained = copy.deepcopy(plain)
    convert(chained, spec=spec, init=None, chain=True)

    def place(model: nn.Module) -> nn.Module:
        model.to(device=how.device, dtype=how.dtype)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    eager = _with_activations(plain, lambda: _Stock(spec))
    x = how.randn(*shape)
    models = {"fused": fused, "fused chain": chained, "eager": eager}
    for model in models.values():
        place(model)
    with torch.no_grad():
        grad = randn_like(eager(x), how.seed + 1)

    nets = {name: _Net(model, x, grad) for name, model in models.items()}
    if spec.foldable:
        for name, inplace in (("folded", False), ("inplace", True)):
            folded, scale = fold(plain, spec, inplace)
            nets[name] = _Net(place(folded), x, grad, scale)
    for name in how.compiled:
        # Nets are compiled as users would compile them, with CUDA graphs.
        how_compiled = COMPILED[name].removesuffix("-no-cudagraphs")
        compiled_model = cast(nn.Module, torch.compile(eager, mode=how_compiled))
        nets[name] = _Net(compiled_model, x, grad)
    ours = {"claims": True}
    marks = {"fused": ours, "fused chain": ours, "eager": {"yardstick": True}}
    found = {
        name: net.candidate(how.mode, compiled=name in COMPILED, **marks.get(name, {}))
        for name, net in nets.items()
    }

    def truth() -> Leaves:
        return _Net(copy.deepcopy(eager).double(), x.double(), grad.double()).check()

    leaves = (x, *(p for net in nets.values() for p in net.model.parameters()))
    return Task(found, truth, how.dtype, leaves=leaves, tolerance=EITHER_BRANCH)


def fold(
    plain: nn.Sequential, spec: ActSpec, inplace: bool = False
) -> tuple[nn.Module, dict[str, float]]:
    """A copy of a net with γ multiplied into the layer before each activation.

    Returns:
        The net, and by how much each parameter was multiplied.
    """
    slope = spec.negative_slope
    model = _with_activations(plain, lambda: nn.LeakyReLU(slope, inplace))
    scale: dict[str, float] = {}
    last = ""
    for name, module in model.named_children():
        if kind_of(module) is not None:
            last = name
        elif isinstance(module, nn.LeakyReLU):
            for key, parameter in model.get_submodule(last).named_parameters():
                parameter.data.mul_(spec.output_scale)
                scale[f"{last}.{key}"] = spec.output_scale
    return model, scale


def _with_activations(plain: nn.Sequential, make: Callable[[], nn.Module]) -> nn.Sequential:
    model = copy.deepcopy(plain)
    for name, module in plain.named_children():
        if isinstance(module, nn.ReLU):
            setattr(model, name, make())
    return model


def _bias(channels: int, how: How) -> Tensor:
    return (0.1 * how.randn(channels, offset=99)).requires_grad_()


def _weights(cout: int, cin: int, k: int, suffix: str, how: How) -> Leaves:
    w = how.randn(cout, cin, k, k, offset=2) / (cin * k * k) ** 0.5
    return {f"weight{suffix}": w.requires_grad_(), f"bias{suffix}": _bias(cout, how)}


def _arithmetic(dtype: torch.dtype) -> roofline.Arithmetic:
    if dtype == torch.float16:
        return "float16"
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _conv_traffic(layer: roofline.Convolution, dgrad: bool) -> tuple[Traffic, Traffic]:
    """Traffic of a perfectly fused layer: 2 passes forward; backward 3 of dgrad and 2 of wgrad."""
    wgrad = traffic(layer, "conv_wgrad")
    if not dgrad:
        return traffic(layer, "conv_act"), wgrad
    both = traffic(layer, "conv_dgrad_act")
    total = Traffic(both.bytes + wgrad.bytes, both.flops + wgrad.flops)
    return traffic(layer, "conv_act"), total
