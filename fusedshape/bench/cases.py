"""The list of all cases: what is measured, at which sizes, and in which suites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from fusedshape import theory
from fusedshape.activations import ACTIVATIONS
from fusedshape.bench import constants, providers
from fusedshape.bench.providers import How, Mode, Task
from fusedshape.convert import convert
from fusedshape.diagnose import diagnose
from fusedshape.models import vanilla_convnet, vanilla_mlp, vanilla_resnet, vanilla_vgg16
from fusedshape.spec import ActSpec
from fusedshape.timing import Candidate

#: Layers of the network whose constants the cases use.
DEPTH = 50
#: The distinct convolutions of ResNet-50: input channels, output channels, kernel, stride, size.
RESNET50 = (
    (3, 64, 7, 2, 224),
    (64, 64, 1, 1, 56),
    (64, 64, 3, 1, 56),
    (64, 256, 1, 1, 56),
    (256, 64, 1, 1, 56),
    (256, 128, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (128, 512, 1, 1, 28),
    (256, 512, 1, 2, 56),
    (512, 128, 1, 1, 28),
    (128, 128, 3, 1, 28),
    (512, 256, 1, 1, 28),
    (256, 256, 3, 2, 28),
    (256, 1024, 1, 1, 14),
    (512, 1024, 1, 2, 28),
    (1024, 256, 1, 1, 14),
    (256, 256, 3, 1, 14),
    (1024, 512, 1, 1, 14),
    (512, 512, 3, 2, 14),
    (512, 2048, 1, 1, 7),
    (1024, 2048, 1, 2, 14),
    (2048, 512, 1, 1, 7),
    (512, 512, 3, 1, 7),
)
#: The distinct convolutions of VGG-16.
VGG16 = (
    (3, 64, 3, 1, 224),
    (64, 64, 3, 1, 224),
    (64, 128, 3, 1, 112),
    (128, 128, 3, 1, 112),
    (128, 256, 3, 1, 56),
    (256, 256, 3, 1, 56),
    (256, 512, 3, 1, 28),
    (512, 512, 3, 1, 28),
    (512, 512, 3, 1, 14),
)
_KEY = ((64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14), (512, 512, 3, 1, 7))
_ONE_BY_ONE = ((64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (1024, 256, 1, 1, 14))
#: Activations for which DKS or TAT has constants.
SHAPED = tuple(name for name in ACTIVATIONS if name != "square")
#: Inputs of the accuracy suite: standard deviation, and weight of the residual if there is one.
ACCURACY: dict[str, tuple[float, float | None]] = {
    "N(0, 1)": (1.0, None),
    "N(0, 5²)": (5.0, None),
    "N(0, 50²)": (50.0, None),
    "residual 0.8": (1.0, 0.8),
}
#: Depths of the scaling suite.
DEPTHS = (10, 100, 1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Setting:
    """Where and how a problem is built.

    Attributes:
        device: device of the tensors.
        seed: seed of all random numbers.
        compiled: names of `providers.COMPILED` that the suite allows.
    """

    device: torch.device
    seed: int = 0
    compiled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One row of a record.

    Attributes:
        name: group/what/…, unique in each suite.
        suites: names of the suites that run it. They run cases in the order of the list.
        build: makes the problem.
        parameters: what tables and plots select rows by.
        timed: whether it is timed; memory and errors are always measured.
    """

    name: str
    suites: tuple[str, ...]
    build: Callable[[Setting], Task]
    parameters: dict[str, Any] = field(default_factory=dict)
    timed: bool = True

    @property
    def group(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]


@lru_cache
def spec_of(activation: str) -> ActSpec:
    """Constants of a network of `DEPTH` layers: TAT's for leaky_relu, DKS's for all others."""
    method = "TAT" if activation == "leaky_relu" else "DKS"
    return theory.solve(method, activation, depth=DEPTH)


_COMPILED = tuple(providers.COMPILED)


@dataclass(frozen=True)
class Family:
    """What the cases of a layer or a network have in common.

    Attributes:
        suites: suites that run them.
        dtype: dtype of all tensors.
        mode: what is timed.
        activation: activation of the layers.
        channels_last: memory format of tensors of four dimensions.
        compiled: names of `providers.COMPILED` to run where the suite allows them.
    """

    suites: tuple[str, ...]
    dtype: str = "float32"
    mode: Mode = "step"
    activation: str = "leaky_relu"
    channels_last: bool = True
    compiled: tuple[str, ...] = ()

    @property
    def spec(self) -> ActSpec:
        """Constants of the activation."""
        return spec_of(self.activation)

    def how(self, setting: Setting) -> How:
        """How a problem of this family is built and run."""
        return How(
            setting.seed,
            setting.device,
            getattr(torch, self.dtype),
            self.channels_last,
            self.mode,
            tuple(name for name in self.compiled if name in setting.compiled),
        )

    def case(self, name: str, build: Callable[[How], Task], **parameters: Any) -> Case:
        """A case with these parameters, the dtype and the mode."""
        return Case(
            name,
            self.suites,
            lambda setting: build(self.how(setting)),
            {**parameters, "dtype": self.dtype, "mode": self.mode},
        )


def _pointwise(family: Family, shape: tuple[int, ...], name: str = "") -> Case:
    layout = "channels_last" if family.channels_last else "contiguous"
    size = "x".join(map(str, shape))
    return family.case(
        name or f"pointwise/{family.activation}/{size}/{layout}/{family.dtype}/{family.mode}",
        lambda how: providers.pointwise(family.spec, shape, how),
        activation=family.activation,
        shape=list(shape),
        layout=layout,
    )


def _conv(
    family: Family, shape: tuple[int, int, int, int, int], batch: int, name: str = ""
) -> Case:
    cin, cout, k, stride, size = shape
    layer = f"{cin}-{cout}-{k}x{k}-s{stride}-{size}-n{batch}"
    return family.case(
        name or f"conv_act/{family.activation}/{layer}/{family.dtype}/{family.mode}",
        lambda how: providers.convolution(family.spec, shape, batch, how),
        activation=family.activation,
        shape=list(shape),
        batch=batch,
    )


def _linear(family: Family, shape: tuple[int, int, int], name: str = "") -> Case:
    size = "x".join(map(str, shape))
    return family.case(
        name or f"linear_act/{family.activation}/{size}/{family.dtype}/{family.mode}",
        lambda how: providers.linear(family.spec, shape, how),
        activation=family.activation,
        shape=list(shape),
    )


def _chain(family: Family, depth: int, shape: tuple[int, int, int]) -> Case:
    size = "x".join(map(str, shape))
    return family.case(
        f"chain/{family.activation}/{depth}-layers-{size}/{family.dtype}/{family.mode}",
        lambda how: providers.chain(family.spec, depth, shape, how),
        depth=depth,
        shape=list(shape),
    )


def _growth(case: Case, series: str, size: int, metric: str) -> Case:
    """A case as one point of a series, by which growth is fitted."""
    parameters = {"series": series, "size": size, "metric": metric}
    name = f"scaling/{series}/{size}"
    return replace(case, name=name, parameters=parameters, timed=metric == "ms")


def _net(
    family: Family, name: str, make: Callable[[], nn.Sequential], shape: tuple[int, ...]
) -> Case:
    size = "x".join(map(str, shape))
    return family.case(
        f"net/{name}/{size}/{family.dtype}/{family.mode}",
        lambda how: providers.network(make, shape, how),
        net=name,
        shape=list(shape),
    )


def _constants(suites: tuple[str, ...], method: str, activation: str, depth: int = DEPTH) -> Case:
    return Case(
        f"constants/{method}/{activation}",
        suites,
        lambda setting: constants.constants(method, activation, depth),
        {"method": method, "activation": activation, "depth": depth},
    )


def _accuracy(suites: tuple[str, ...], activation: str, method: str, dtype: str) -> Iterator[Case]:
    """Errors in half precision, for inputs near the origin and in the tails, and with a residual.

    Constants of DKS are included because their δ is not 0: the sign of y does not tell on which
    side of a kink z was.
    """

    def build(setting: Setting, scale: float, weight: float | None) -> Task:
        spec = theory.solve(method, activation, depth=DEPTH)
        return providers.accuracy(spec, scale, weight, Family(suites, dtype).how(setting))

    for column, (scale, weight) in ACCURACY.items():
        yield Case(
            f"accuracy/{method} {activation}/{dtype}/{column}",
            suites,
            partial(build, scale=scale, weight=weight),
            {"activation": activation, "method": method, "dtype": dtype, "input": column},
            timed=False,
        )


def _overhead(suites: tuple[str, ...]) -> Iterator[Case]:
    """Calls on so few numbers that they measure the work of the host alone."""
    family = Family(suites)
    yield _pointwise(replace(family, channels_last=False), (1, 4), "overhead/bias_act")
    yield _linear(family, (1, 4, 4), "overhead/linear_act")
    yield _conv(family, (4, 4, 1, 1, 1), 1, "overhead/conv_act")


def _solving(method: str, activation: str, depth: int) -> Case:
    series = {"series": f"solve {method} {activation}", "size": depth, "metric": "ms"}
    return Case(
        f"scaling/{series['series']}/{depth}",
        ("scaling",) + (("smoke",) if depth <= 1_000 and method == "TAT" else ()),
        # TAT's usual η of 0.9 is out of reach for 10 layers.
        lambda setting: constants.constants(method, activation, depth, eta=0.8, beside=False),
        series,
    )


class _Loop(nn.Module):
    """A chain whose forward calls its layers in a loop, which torch.fx has to unroll."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def _tracing(depth: int, loop: bool) -> Case:
    def build(setting: Setting) -> Task:
        # Layers have one feature, because the time per layer is what is measured.
        chain = (m for _ in range(depth) for m in (nn.Linear(1, 1), nn.ReLU()))
        model = _Loop(depth) if loop else nn.Sequential(*chain)

        def check() -> dict[str, torch.Tensor]:
            return {"depth": torch.tensor(theory.trace_wiring(model).depth)}

        own = Candidate(lambda _: theory.trace_wiring(model), check=check, claims=True)
        return Task({"fused": own}, lambda: {"depth": torch.tensor(depth)})

    name = "trace a loop" if loop else "trace a chain"
    series = {"series": name, "size": depth, "metric": "ms"}
    suites = ("scaling", "smoke") if depth <= 10 else ("scaling",)
    return Case(f"scaling/{name}/{depth}", suites, build, series)


def _diagnosing(
    suites: tuple[str, ...], name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> Case:
    """The time of diagnose beside that of one forward pass."""

    def build(setting: Setting) -> Task:
        generator = torch.Generator().manual_seed(setting.seed)
        model, x = make(), torch.randn(shape, generator=generator)
        depth = convert(model, generator=generator).depth

        def forward(_: object) -> torch.Tensor:
            with torch.no_grad():
                return model(x)

        def check() -> dict[str, torch.Tensor]:
            layers = [row for row in diagnose(model, x).layers if row.op == "nonlinear"]
            return {"depth": torch.tensor(len(layers))}

        own = Candidate(lambda _: diagnose(model, x), check=check, claims=True)
        return Task(
            {"fused": own, "bare": Candidate(forward)}, lambda: {"depth": torch.tensor(depth)}
        )

    return Case(f"diagnose/{name}", suites, build, {"shape": list(shape)})


def _all() -> Iterator[Case]:
    smoke, cpu, solver = Family(("smoke",)), Family(("cpu",)), ("solver",)
    quick = Family(("gpu-quick", "gpu"), "bfloat16")
    gpu = Family(("gpu",), "bfloat16")
    modes: tuple[Mode, ...] = ("forward", "backward", "step")

    # The smallest of everything.
    yield _pointwise(replace(smoke, activation="tanh"), (2, 8, 6, 6))
    contiguous = Family(smoke.suites, "bfloat16", "backward", "swish", channels_last=False)
    yield _pointwise(contiguous, (2, 8, 6, 6))
    for mode in modes:
        yield _conv(replace(smoke, mode=mode), (8, 8, 3, 1, 6), 2)
    yield _linear(smoke, (6, 8, 8))
    yield _chain(smoke, 3, (2, 8, 6))
    yield _net(smoke, "convnet-20-w8", partial(vanilla_convnet, 20, width=8), (4, 2, 8, 8))
    yield _constants(smoke.suites, "TAT", "leaky_relu")

    # A GPU, the most telling first.
    batch = 64
    layer = replace(quick, compiled=_COMPILED)
    for shape in _KEY:
        yield _conv(layer, shape, batch)
    for mode in ("forward", "backward"):
        yield _pointwise(replace(quick, mode=mode), (batch, 256, 56, 56))
    yield _chain(layer, 16, (batch, 64, 56))
    yield _net(quick, "resnet50", vanilla_resnet, (batch, 3, 224, 224))
    for shape in _ONE_BY_ONE:
        yield _conv(layer, shape, batch)
    for shape in _KEY:
        for mode in ("forward", "backward"):
            yield _conv(replace(layer, mode=mode), shape, batch)
    yield _linear(layer, (8192, 4096, 4096))
    yield _net(quick, "vgg16", vanilla_vgg16, (32, 3, 224, 224))
    yield _chain(layer, 16, (batch, 128, 28))
    for activation in ("tanh", "softplus", "swish"):
        yield _pointwise(replace(quick, activation=activation), (batch, 256, 56, 56))
    yield _conv(replace(layer, activation="tanh"), _KEY[1], batch)
    for dtype in ("float16", "float32"):
        yield _conv(replace(layer, dtype=dtype), _KEY[1], batch)
    for shape in RESNET50:
        if shape not in _KEY and shape not in _ONE_BY_ONE:
            yield _conv(quick, shape, batch)
    yield from _overhead(("gpu-quick", "gpu", "cpu", "smoke"))
    for activation in SHAPED:
        for dtype in ("bfloat16", "float16", "float32"):
            family = replace(gpu, activation=activation, dtype=dtype)
            yield _pointwise(family, (batch, 128, 28, 28))
    layer = replace(gpu, compiled=_COMPILED)
    for name, make in (("resnet50", vanilla_resnet), ("vgg16", vanilla_vgg16)):
        yield _net(layer, name, make, (128, 3, 224, 224))
    for shape in dict.fromkeys((*_KEY, *_ONE_BY_ONE, *RESNET50, *VGG16)):
        for n in (32, 256):
            for mode in modes:
                yield _conv(replace(layer, mode=mode), shape, n)

    # Two cores.
    layer = replace(cpu, compiled=_COMPILED)
    for shape in RESNET50:
        yield _conv(layer, shape, 8)
    for dtype in ("float32", "bfloat16", "float16"):
        for activation in SHAPED:
            yield _pointwise(replace(cpu, activation=activation, dtype=dtype), (8, 64, 56, 56))
    for activation in ("leaky_relu", "tanh", "swish"):
        for mode in ("forward", "backward"):
            yield _pointwise(replace(cpu, activation=activation, mode=mode), (8, 64, 56, 56))
    yield _pointwise(replace(cpu, channels_last=False), (8, 64, 56, 56))
    for sizes in ((512, 512, 512), (64, 2048, 2048)):
        yield _linear(layer, sizes)
    yield _linear(replace(cpu, activation="softplus"), (512, 512, 512))
    yield _chain(cpu, 16, (8, 32, 28))
    resnet = partial(vanilla_resnet, 50, num_classes=10, width=16)
    yield _net(cpu, "convnet-50-w32", partial(vanilla_convnet, 50, width=32), (64, 2, 8, 8))
    yield _net(cpu, "resnet50-w16", resnet, (8, 3, 64, 64))
    yield _net(cpu, "mlp-30-w128", partial(vanilla_mlp, 30), (256, 128))
    yield Case("import/fusedshape", cpu.suites, lambda setting: constants.importing())
    convnet = partial(vanilla_convnet, 50, width=64, in_channels=3)
    yield _diagnosing(cpu.suites, "convnet-50-w64", convnet, (32, 3, 32, 32))
    mlp = partial(vanilla_mlp, 50, width=1024, in_features=1024)
    yield _diagnosing(cpu.suites, "mlp-50-w1024", mlp, (256, 1024))
    mlp = partial(vanilla_mlp, 50, width=64, in_features=64)
    yield _diagnosing((*cpu.suites, *smoke.suites), "mlp-50-w64", mlp, (32, 64))
    for method in ("DKS", "TAT"):
        for activation in SHAPED:
            if (method, activation) != ("TAT", "relu"):
                yield _constants(solver, method, activation)

    for dtype in ("bfloat16", "float16"):
        yield from _accuracy(("accuracy", "smoke"), "leaky_relu", "TAT", dtype)
        for activation in SHAPED:
            yield from _accuracy(("accuracy",), activation, "DKS", dtype)

    # Growth: with depth, with batch.
    for depth in DEPTHS:
        yield _solving("TAT", "leaky_relu", depth)
        yield _solving("DKS", "tanh", depth)
        yield _solving("TAT", "tanh", depth)
    for depth in DEPTHS:
        yield _tracing(depth, loop=False)
        if depth <= 10_000:
            yield _tracing(depth, loop=True)
    scaling = Family(("scaling",))
    for depth in (4, 8, 16, 32, 64):
        case = _chain(scaling, depth, (4, 16, 16))
        yield _growth(case, "memory of a chain by depth", depth, "saved_bytes")
    for n in (1, 2, 4, 8, 16, 32, 64):
        case = _chain(scaling, 4, (n, 32, 28))
        yield _growth(case, "step of a chain by batch", n, "ms")


CASES: tuple[Case, ...] = tuple(_all())
