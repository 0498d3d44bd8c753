"""Across modules: tracers, exporters and tensors of other classes give right numbers or say no."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode

import fusedshape as fs
from fusedshape import ActSpec, ops
from fusedshape.activations import ACTIVATIONS

# TorchScript is on its way out, and still what many models are exported by.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
SMOOTH = ActSpec("tanh", 1.1, 0.2, 0.1, 1.3)
BENT = ActSpec("leaky_relu", 1.1, 0.2, 0.1, 1.3, 0.3)
WAVED = ActSpec("swish", 1.1, 0.2, 0.1, 1.3)


def spec_of(name: str) -> ActSpec:
    return ActSpec(name, 0.9, 0.1, -0.2, 1.3, 0.3 if name == "leaky_relu" else 0.0)


class Net(nn.Module):
    """Every op and module there is, called as users call them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = fs.PerLocationNorm()
        self.conv = fs.ShapedConv2d(4, 6, 3, padding=1, spec=SMOOTH)
        self.chain = fs.ShapedChain(
            fs.ShapedConv2d(6, 6, 3, padding="same", spec=BENT),
            fs.ShapedConv2d(6, 6, (2, 3), padding="same", padding_mode="circular", spec=WAVED),
            fs.ShapedConv2d(6, 6, 3, padding=1, groups=2, spec=SMOOTH),
            fs.ShapedConv2d(6, 6, 3, padding=1, spec=SMOOTH),
        )
        self.act = fs.ShapedActivation(BENT)
        self.sum = fs.NormalizedSum((0.6, 0.8))
        self.linear = fs.ShapedLinear(6, 5, spec=BENT)
        self.head = nn.Linear(5, 3)

    def forward(self, x):  # type: ignore[no-untyped-def]  # fx pickles no annotation in a string
        x = self.conv(self.norm(x))
        y = self.act(self.chain(x))
        x = ops.bias_act(self.sum(x, y), self.linear.weight[0], SMOOTH)
        maps, bias = self.conv.weight[:, :1], self.conv.bias
        how: dict[str, Any] = {"groups": 6, "padding": 1, "residual": y, "residual_weight": 0.6}
        x = ops.conv_act(x, maps, bias, WAVED, **how)
        layer = ops.ChainLayer(self.linear.weight, self.linear.bias, SMOOTH)
        rows = ops.conv_chain(x.mean((2, 3)), [layer])
        again = ops.linear_act(
            rows, self.head.weight, None, BENT, residual=rows[:, :3], residual_weight=0.3
        )
        return self.head(self.linear(x.mean((2, 3))) + rows) + again


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    for p in made.parameters():
        if p.ndim == 1:
            nn.init.normal_(p)
    return made


X = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def agree(got: Tensor, want: Tensor, ulps: float = 64) -> None:
    eps = torch.finfo(want.dtype).eps
    assert (got - want).abs().max() <= ulps * eps * want.abs().max()


@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace_keeps_every_op_without_a_warning(net: Net, grad: bool) -> None:
    want = net(X).detach()
    with torch.set_grad_enabled(grad):  # warnings are errors here
        traced = torch.jit.trace(net, X)
    assert "fusedshape::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for made in (traced, torch.jit.freeze(traced), torch.jit.load(file)):
        agree(made(X).detach(), want)
        other = torch.cat([X, X.flip(3)])  # of another batch
        agree(made(other).detach(), net(other).detach())


def test_what_jit_trace_made_has_the_models_gradients(net: Net) -> None:
    net = net.double()
    x = X.double().requires_grad_()
    traced = torch.jit.trace(net, x)
    leaves = [x, *net.parameters()]
    want = torch.autograd.grad(net(x).square().sum(), leaves)
    for got, w in zip(torch.autograd.grad(traced(x).square().sum(), leaves), want, strict=True):
        agree(got, w, ulps=1e4)


def test_jit_trace_checks_arguments_as_ever() -> None:
    layer = fs.ShapedConv2d(4, 6, 3, spec=SMOOTH)
    with pytest.raises(ValueError, match="input has 3"):
        torch.jit.trace(layer, X)
    layer = fs.ShapedConv2d(3, 6, 3, spec=SMOOTH, engine="native")
    with pytest.raises(ValueError, match=r"engine 'native' cannot run under .*jit.trace"):
        torch.jit.trace(layer, X)


@pytest.mark.parametrize(
    "layer",
    [
        fs.ShapedActivation(SMOOTH),
        fs.ShapedLinear(2, 2, spec=SMOOTH),
        nn.Sequential(fs.ShapedConv1d(2, 2, 3, spec=SMOOTH)),
    ],
)
def test_jit_script_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"torch.jit.script: Shaped\w+ .*jit.trace"):
        torch.jit.script(layer)


def onnx_run(net: nn.Module, x: Tensor, *, dynamo: bool) -> list[Tensor]:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", torch.jit.TracerWarning)
        if dynamo:
            program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
            assert program is not None
            program.save(file)
        else:
            torch.onnx.export(net, (x,), file, dynamo=False)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(y) for y in found]


class Every(nn.Module):
    """All activations, by themselves and in layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(fs.ShapedLinear(6, 6, spec=spec_of(n)) for n in ACTIVATIONS)
        self.convs = nn.ModuleList(
            fs.ShapedConv1d(5, 5, 3, padding=1, spec=spec_of(n)) for n in ACTIVATIONS
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = [ops.shaped_act(5 * x, spec_of(name)) for name in ACTIVATIONS]
        return *made, *(f(x) for f in self.linears), *(f(x) for f in self.convs)


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_has_every_activation(dynamo: bool) -> None:
    torch.manual_seed(0)
    net = Every().eval()
    x = torch.randn(4, 5, 6)
    with torch.no_grad():
        want = net(x)
    for got, w in zip(onnx_run(net, x, dynamo=dynamo), want, strict=True):
        # onnxruntime's own erf, tanh and exp are good for some units in the last place of 1.
        assert (got - w).abs().max() <= 16 * torch.finfo(w.dtype).eps * (1 + w.abs().max())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_has_every_op(net: Net, dynamo: bool, grad: bool) -> None:
    want = net(X).detach()
    with torch.set_grad_enabled(grad):
        (got,) = onnx_run(net, X, dynamo=dynamo)
    agree(got, want)


@pytest.mark.parametrize("name", [n for n, row in ACTIVATIONS.items() if row.exported])
def test_exported_forms_are_the_activations(name: str) -> None:
    row = ACTIVATIONS[name]
    assert row.exported is not None
    u = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-3e38, -1e12, 1e-30, 1e12, 3e38])])
    want = row.value(u.double(), 0.0)
    error = (row.exported(u, 0.0).double() - want).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * (1 + want.abs())).all()


def retraced(module: nn.Module) -> nn.Module:
    return fx.symbolic_trace(fx.symbolic_trace(module))


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(fx.symbolic_trace(module)))


class Leaves(fx.Tracer):
    """A tracer that does not look into our modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("fusedshape") or super().is_leaf_module(
            m, module_qualified_name
        )


@pytest.mark.parametrize(
    "trace",
    [
        fx.symbolic_trace,
        retraced,
        pickled,
        lambda net: fx.GraphModule(net, Leaves().trace(net)),
        lambda net: fx.Transformer(fx.symbolic_trace(net)).transform(),
        lambda net: torch.jit.trace(fx.symbolic_trace(net), X),
        lambda net: torch.export.export(fx.symbolic_trace(net), (X,)).module(),
        lambda net: torch.compile(fx.symbolic_trace(net), backend="eager", fullgraph=True),
    ],
    ids=["fx", "again", "pickled", "leaves", "transformed", "jit", "export", "compile"],
)
def test_fx_keeps_every_op(net: Net, trace: Callable[[nn.Module], Any]) -> None:
    torch.compiler.reset()
    agree(trace(net)(X).detach(), net(X).detach())


@pytest.mark.parametrize(
    "layer",
    [
        fs.ShapedConv1d(3, 4, 1, spec=SMOOTH),
        fs.ShapedLinear(4, 4, spec=SMOOTH),
        fs.ShapedActivation(BENT),
        fs.ShapedChain(fs.ShapedLinear(4, 4, spec=SMOOTH), fs.ShapedLinear(4, 2, spec=BENT)),
        fs.PerLocationNorm("avg_q"),
    ],
)
def test_a_traced_module_of_ours_pickles(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 4) if isinstance(layer, fs.ShapedConv1d) else torch.randn(2, 4)
    assert torch.equal(pickled(layer)(x), layer(x))


def test_an_op_is_one_node_of_fx() -> None:
    graph = fx.symbolic_trace(fs.ShapedConv2d(3, 4, 3, spec=SMOOTH)).graph
    (node,) = graph.find_nodes(op="call_function", target=ops.conv_act)
    assert node.args[3].target.__name__ == "from_text"


def test_fold_and_convert_read_what_fx_made(net: Net) -> None:
    traced = fx.symbolic_trace(net)
    agree(fs.fold(traced, example=X)(X).detach(), net(X).detach())
    stack = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    fs.convert(stack, method="EOC", activation="tanh")
    with pytest.raises(ValueError, match="found no activation to replace"):
        fs.convert(fx.symbolic_trace(stack), method="EOC", activation="tanh")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_every_op(net: Net, strict: bool, grad: bool) -> None:
    want = net(X).detach()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(net, (X,), strict=strict)
    agree(program.module()(X).detach(), want)


def test_make_fx_and_functionalize_keep_every_op(net: Net) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    want = net(X).detach()
    agree(make_fx(net)(X)(X).detach(), want)
    agree(make_fx(torch.func.functionalize(net))(X)(X).detach(), want)
    params = dict(net.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, params, (x,)).square().sum()

    def slope(params: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss(params, x), list(params.values())))

    for got, w in zip(make_fx(slope)(params, X)(params, X), slope(params, X), strict=True):
        agree(got, w)


def test_a_function_mode_sees_each_op_once(net: Net) -> None:
    seen: list[Any] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        got = net(X)
    assert torch.equal(got, net(X))
    counts = {op: seen.count(op) for op in (ops.shaped_act, ops.bias_act, ops.linear_act)}
    assert list(counts.values()) == [1, 1, 2]
    assert [seen.count(ops.conv_act), seen.count(ops.conv_chain)] == [4, 2]
    with torch.device("cpu"):
        assert torch.equal(net(X), got)


def test_a_class_of_tensors_overrides_an_op() -> None:
    class Named(torch.Tensor):
        pass

    class Counted:
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func, len(args)

    x = torch.randn(3, 4)
    y = ops.shaped_act(x.as_subclass(Named), SMOOTH)
    assert type(y) is Named
    assert torch.equal(y.as_subclass(Tensor), ops.shaped_act(x, SMOOTH))
    w: Any = Counted()
    assert ops.shaped_act(w, SMOOTH) == (ops.shaped_act, 2)
    assert ops.linear_act(x, w, None, SMOOTH) == (ops.linear_act, 4)
    assert ops.conv_act(x, x, w, SMOOTH) == (ops.conv_act, 4)
    assert ops.bias_act(x, w, SMOOTH) == (ops.bias_act, 3)
    assert ops.conv_chain(w, [ops.ChainLayer(x, None, SMOOTH)]) == (ops.conv_chain, 2)
    assert ops.conv_chain(x, [ops.ChainLayer(w, None, SMOOTH)]) == (ops.conv_chain, 2)


def test_tensors_that_dispatch_themselves_are_given_torchs_operators(net: Net) -> None:
    from torch.testing._internal.logging_tensor import LoggingTensor, capture_logs
    from torch.testing._internal.two_tensor import TwoTensor

    want = net(X)
    with capture_logs() as logs:
        got: Any = net(LoggingTensor(X))
        got.square().sum().backward()
    assert logs
    assert not any("fusedshape" in line for line in logs)
    agree(got.elem, want.detach())
    grads = [p.grad for p in net.parameters()]
    wanted = torch.autograd.grad(want.square().sum(), list(net.parameters()))
    for g, w in zip(grads, wanted, strict=True):
        assert g is not None
        agree(getattr(g, "elem", g), w, ulps=1e3)
    both: Any = net(TwoTensor(X, 2 * X))
    agree(both.a.detach(), want.detach())
    agree(both.b.detach(), net(2 * X).detach())
    x: Any = TwoTensor(X, X)
    layer = fs.ShapedConv2d(3, 4, 3, spec=SMOOTH, engine="native")
    with pytest.raises(ValueError, match=r"engine 'native' cannot run .* other classes"):
        layer(x)


def test_a_sharded_tensor_goes_through_every_op(net: Net) -> None:
    from torch import distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        x = torch.randn(4, 6)
        w, b = torch.randn(5, 6), torch.randn(5)
        parts = [distribute_tensor(t, mesh, [p]) for t, p in ((x, Shard(0)), (w, Replicate()))]
        bias = distribute_tensor(b, mesh, [Replicate()])
        y = ops.linear_act(*parts, bias, WAVED)
        assert isinstance(y, DTensor)
        agree(y.full_tensor(), ops.linear_act(x, w, b, WAVED))
        agree(ops.shaped_act(parts[0], BENT).full_tensor(), ops.shaped_act(x, BENT))
    finally:
        dist.destroy_process_group()


class Joined(nn.Module):
    """A layer with a residual."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer: Any = (
            fs.ShapedLinear(4, 4, spec=SMOOTH)
            if kind == "linear"
            else fs.ShapedConv2d(4, 4, 3, padding=1, spec=SMOOTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        tensors, how = (x, self.layer.weight, self.layer.bias, WAVED), {"residual_weight": 0.6}
        if self.layer.weight.shape[1:] == (4,):
            return ops.linear_act(*tensors, residual=x, **how)
        return ops.conv_act(*tensors, padding=1, residual=x, **how)


C = fs.ShapedConv2d
PER_SAMPLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: fs.ShapedLinear(4, 5, spec=WAVED), (3, 4)),
    "linear of rows": (lambda: fs.ShapedLinear(4, 5, spec=BENT, bias=False), (3, 7, 4)),
    "conv1d": (lambda: fs.ShapedConv1d(4, 6, 3, spec=WAVED, padding=2), (3, 4, 7)),
    "conv2d": (lambda: C(4, 6, (3, 2), spec=BENT, stride=2, padding=1), (3, 4, 7, 6)),
    "same": (lambda: C(4, 6, (3, 2), spec=BENT, padding="same", dilation=2), (3, 4, 7, 6)),
    "groups": (lambda: C(4, 6, 3, spec=BENT, groups=2), (3, 4, 7, 6)),
    "circular": (lambda: C(4, 6, 3, spec=BENT, padding=1, padding_mode="circular"), (3, 4, 7, 6)),
    "conv3d": (lambda: fs.ShapedConv3d(4, 6, 3, spec=SMOOTH, padding=1), (3, 4, 4, 4, 4)),
    "conv3d, groups": (lambda: fs.ShapedConv3d(4, 6, 3, spec=BENT, groups=2), (3, 4, 4, 4, 4)),
    "conv residual": (lambda: Joined("conv"), (3, 4, 5, 5)),
    "linear residual": (lambda: Joined("linear"), (3, 4)),
    "chain": (
        lambda: fs.ShapedChain(C(4, 6, 3, spec=SMOOTH), C(6, 6, 3, spec=WAVED)),
        (3, 4, 7, 7),
    ),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_expanded_weights_are_gradients_of_single_samples(name: str) -> None:
    torch.manual_seed(0)
    make, shape = PER_SAMPLE[name]
    net, x = make().double(), torch.randn(shape, dtype=torch.float64)
    params: Any = list(net.parameters())
    for p in params:
        nn.init.normal_(p)
    call_for_per_sample_grads(net)(x).square().sum().backward()
    for i in range(len(x)):
        want = torch.autograd.grad(net(x[i : i + 1]).square().sum(), params)
        for p, w in zip(params, want, strict=True):
            agree(p.grad_sample[i], w, ulps=1e3)


def test_expanded_weights_refuse_bias_act_by_name() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return ops.bias_act(x, self.bias, BENT)

    with pytest.raises(RuntimeError, match=r"bias_act: .*ExpandedWeights"):
        call_for_per_sample_grads(Biased())(torch.randn(3, 4))
