"""unfuse and fuse: the same numbers, parameters and keys on the way there and back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, prune

from fusedshape.convert import convert
from fusedshape.fold import fold
from fusedshape.kinds import KINDS, FusedLayer
from fusedshape.nn import (
    ShapedActivation,
    ShapedChain,
    ShapedConv2d,
    ShapedLinear,
    chain_rows,
    is_place,
)
from fusedshape.theory import trace_wiring
from fusedshape.undo import UndoLog
from fusedshape.unfuse import Unfused, fuse, unfuse
from tests.support.convertible import ZOO, run
from tests.support.specs import shaped

SPEC = shaped("softplus")
ROW = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def layer(spec: Any = SPEC, **kwargs: Any) -> ShapedLinear:
    return ShapedLinear(6, 6, spec=spec, dtype=torch.float64, **kwargs)


def structure(model: nn.Module) -> list[tuple[str, type, str]]:
    return [(name, type(m), m.extra_repr()) for name, m in model.named_modules()]


def there_and_back(model: nn.Module, x: Tensor) -> nn.Module:
    """Hold unfuse and fuse to all their promises; the unfused model."""
    ids = [id(p) for p in model.parameters()]
    keys, before = list(model.state_dict()), structure(model)
    want = [run(model.train(mode), x) for mode in (False, True)]
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def same(net: nn.Module) -> None:
        assert list(net.state_dict()) == keys
        for mode in (False, True):
            out, grads = run(net.train(mode), x)
            for got, wanted in zip([*out, *grads], [*want[mode][0], *want[mode][1]], strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        net.load_state_dict(state)

    rows = unfuse(model)
    assert len(rows) >= sum(issubclass(kind, FusedLayer) for _, kind, _ in before)
    assert not any(isinstance(m, FusedLayer) for m in model.modules())
    assert [id(p) for p in model.parameters()] == ids
    unfused = copy.deepcopy(model)
    for net in (model, unfused, pickle.loads(pickle.dumps(model))):
        same(net)
    assert unfuse(model) == ()
    fuse(model)
    assert structure(model) == before
    assert [id(p) for p in model.parameters()] == ids
    same(model)
    return unfused


@pytest.mark.parametrize("name", ZOO)
def test_converted_models(name: str) -> None:
    make, x, fused, _ = ZOO[name]
    torch.manual_seed(0)
    model = make().double()
    never = copy.deepcopy(model)
    convert(model, spec=SPEC, init=None, strip_batchnorm=True)
    convert(never, spec=SPEC, init=None, strip_batchnorm=True, fuse=False)
    assert sum(isinstance(m, FusedLayer) for m in model.modules()) == fused
    unfused = there_and_back(model, x.double())
    assert not any(isinstance(m, Unfused) for m in unfused.modules())
    # Every plain layer stands where it would, had it never been fused.
    plain = {n: type(m) for n, m in never.named_modules() if type(m) in {k.plain for k in KINDS}}
    assert plain.items() <= {n: type(m) for n, m in unfused.named_modules()}.items()


@pytest.mark.parametrize("name", ["mlp", "vgg", "functional", "shared, all fused", "loop"])
def test_models_converted_without_fusing_are_fused_later(name: str) -> None:
    make, x, fused, _ = ZOO[name]
    torch.manual_seed(0)
    model = make().double()
    convert(model, spec=SPEC, init=None, fuse=False)
    want = run(model, x.double())[0]
    fuse(model)
    assert sum(isinstance(m, FusedLayer) for m in model.modules()) == fused
    for got, wanted in zip(run(model, x.double())[0], want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


class Own(nn.Module):
    """Fused layers built by hand, called by a forward that also asks for their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = layer(), layer(shaped("tanh"))
        self.more = nn.ModuleList([layer(), self.one])

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x)) + self.one.weight.sum() / self.two.in_features
        for part in self.more:
            x = part(x) + x
        return x


class Opaque(nn.Module):
    """A forward that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(layer(), layer())

    def forward(self, x: Tensor) -> Tensor:
        for part in self.body if x.sum() > 0 else self.body[:1]:
            x = part(x) * 0.5
        return x


def shared() -> nn.Module:
    one = layer()
    return nn.Sequential(one, nn.Tanh(), nn.Sequential(one, layer(bias=False)), one)


def watched() -> nn.Module:
    net = nn.Sequential(layer(), layer())
    net[0].register_forward_hook(lambda module, args, out: out * args[0].mean())
    net[1].register_forward_pre_hook(lambda module, args: (args[0] * module.in_features,))
    return net


HAND_BUILT: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(layer(), layer(shaped("tanh")), nn.Linear(6, 2)),
    "chain": lambda: ShapedChain(layer(), layer(), layer(), nn.Linear(6, 2), max_length=2),
    "own": Own,
    "opaque": Opaque,
    "shared": shared,
}


@pytest.mark.parametrize("name", HAND_BUILT)
def test_layers_built_by_hand(name: str) -> None:
    there_and_back(HAND_BUILT[name]().double(), ROW)


def test_names_of_layers_in_a_sequential_stay() -> None:
    net = ShapedChain(layer(), layer(), nn.Linear(6, 2))
    names = [name for name, _ in net.named_parameters()]
    unfuse(net)
    assert [name for name, _ in net.named_parameters()] == names
    assert [name for name, _ in net.named_children()] == ["0", "0_act", "1", "1_act", "2"]
    assert max(map(len, chain_rows(net._modules))) == 1
    fuse(net)
    assert [len(row) for row in chain_rows(net._modules)] == [2, 1]


def test_hooks_see_what_they_saw() -> None:
    net = watched().double()
    copied = copy.deepcopy(net)
    seen: list[tuple[Any, ...]] = []
    for model in (net, copied):
        for part in model:
            part.register_forward_hook(lambda m, args, out: seen.append((*args, out)))
            part.register_full_backward_hook(lambda m, gin, gout: seen.append((*gin, *gout)))
    unfuse(copied)
    x = ROW.clone().requires_grad_()
    for model in (net, copied):
        model(x).sum().backward()
    half = len(seen) // 2
    assert half == 4
    for ours, theirs in zip(seen[:half], seen[half:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert isinstance(copied[0], Unfused)
    fuse(copied)
    assert structure(copied) == structure(net)
    assert len(copied[0]._forward_hooks) == 2
    torch.testing.assert_close(copied(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_hook_can_be_taken_off_after_unfusing() -> None:
    net = nn.Sequential(layer())
    handle = net[0].register_forward_hook(lambda module, args, out: out * 0)
    unfuse(net)
    assert not net(ROW).any()
    handle.remove()
    assert net(ROW).any()


def test_places_that_no_longer_follow_their_layer_take_nothing() -> None:
    """A converted model may have been taken apart since."""
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU()))).double()
    act = nn.ReLU()
    shared = nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), act).double()
    for model in (net, shared):
        convert(model, spec=SPEC)
    there_and_back(nn.Sequential(*net[:1], nn.Tanh(), *net[1:3], nn.Tanh(), net[4], net[5]), ROW)
    shared[0] = nn.Linear(6, 6).double()  # whose output the place must not activate
    unfused = there_and_back(shared, ROW)
    assert is_place(unfused[1])


def test_what_was_chosen_by_name_comes_back() -> None:
    net = nn.Sequential(layer(engine="aten", backend="reference"))
    unfuse(net)
    assert (net[1].backend, net[1].engine) == ("reference", "aten")
    fuse(pickle.loads(pickle.dumps(net)))
    fuse(net)
    assert (net[0].backend, net[0].engine) == ("reference", "aten")


def test_modes_devices_and_frozen_parameters_stay() -> None:
    net = nn.Sequential(layer(device="meta"), layer(device="meta").eval())
    net[0].weight.requires_grad_(False)
    unfuse(net)
    assert [m.training for m in net] == [True, True, False, False]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert all(p.is_meta for p in net.parameters())
    fuse(net)
    assert [m.training for m in net] == [True, False]


def test_pruned_and_normalised_weights() -> None:
    net = nn.Sequential(layer(), layer())
    prune.l1_unstructured(net[0], "weight", 0.5)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(net[1])
    want = net(ROW)
    unfuse(net)
    assert type(net[0]) is nn.Linear
    torch.testing.assert_close(net(ROW), want, rtol=1e-12, atol=1e-12)
    fuse(net)
    assert [type(m) for m in net] == [ShapedLinear, ShapedLinear]
    torch.testing.assert_close(net(ROW), want, rtol=1e-12, atol=1e-12)


def test_unfused_models_are_read_by_the_rest() -> None:
    for make in (HAND_BUILT["sequential"], lambda: nn.Sequential(Own())):
        net = make().double()
        wiring = trace_wiring(net)
        want = net(ROW)
        unfuse(net)
        assert trace_wiring(net).depth == wiring.depth
        torch.testing.assert_close(fold(net)(ROW), want, rtol=1e-12, atol=1e-12)


def test_state_dicts_of_fused_models_load_into_unfused_ones_and_back() -> None:
    net, other = Own().double(), Own().double()
    unfuse(other)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(other(ROW), net(ROW), rtol=1e-12, atol=1e-12)
    missing = other.load_state_dict({}, strict=False).missing_keys
    assert len(missing) == len(net.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for one\.layer\.weight"):
        other.load_state_dict({**net.state_dict(), "one.weight": torch.zeros(1)})
    assert other.load_state_dict(net.state_dict(), assign=True).missing_keys == []


@pytest.mark.parametrize("what", [unfuse, fuse])
@pytest.mark.parametrize("at", range(4))
def test_an_interrupt_leaves_all_as_it_was(
    what: Callable[[nn.Module], Any], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Sequential(layer(), layer()), Own(), nn.Sequential(layer())).double()
    if what is fuse:
        unfuse(net)
    before, want = structure(net), net(ROW)
    held = [list(m._modules.values()) for m in net.modules()]
    module, count = UndoLog.module, iter(range(10))

    def interrupted(log: UndoLog, *args: Any) -> None:
        module(log, *args)
        if next(count) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(UndoLog, "module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        what(net)
    assert structure(net) == before
    assert [list(m._modules.values()) for m in net.modules()] == held
    assert torch.equal(net(ROW), want)


class Mine(ShapedLinear):
    pass


def set_forward(module: nn.Module) -> nn.Module:
    module.forward = module.forward  # type: ignore[method-assign]
    return module


def pruned_and_watched() -> nn.Module:
    found = prune.l1_unstructured(layer(), "weight", 0.5)
    found.register_forward_hook(lambda module, args, out: None)
    return found  # type: ignore[no-any-return]


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = layer()
        self.all = [self.one]

    def forward(self, x: Tensor) -> Tensor:
        return self.all[0](x)  # type: ignore[no-any-return]


def compiled() -> nn.Module:
    net = nn.Sequential(layer())
    net.compile()
    return net


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: 3, TypeError, "model must be an nn.Module, got int"),
    "a layer": (layer, ValueError, "the model is itself a ShapedLinear"),
    "subclass": (
        lambda: nn.Sequential(layer(), Mine(6, 6, spec=SPEC)),
        ValueError,
        "'1' is a Mine",
    ),
    "pruned and watched": (
        lambda: nn.Sequential(layer(), pruned_and_watched()),
        *(ValueError, r"'1' \(ShapedLinear\) has hooks on its output"),
    ),
    "parametrised": (
        lambda: nn.Sequential(layer(), parametrizations.weight_norm(layer())),
        *(ValueError, "'1' is a ParametrizedShapedLinear.*remove_parametrizations"),
    ),
    "forward": (
        lambda: nn.Sequential(layer(), set_forward(layer())),
        *(ValueError, r"forward of '1' \(ShapedLinear\) is set on the instance"),
    ),
    "in a list": (Keeps, ValueError, r"unfuse: Keeps keeps modules in a plain list, \.all"),
    "wrapped": (
        lambda: nn.DataParallel(nn.Sequential(layer())),
        *(ValueError, "DataParallel; unfuse the module inside, its .module"),
    ),
    "compiled": (compiled, ValueError, "compiled already; unfuse first, then compile"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_before_anything_is_changed(name: str) -> None:
    make, error, message = REFUSED[name]
    model = make()
    before = structure(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        unfuse(model)
    if before is not None:
        assert structure(model) == before


@pytest.mark.parametrize("name", ["no module", "wrapped", "compiled"])
def test_fuse_refuses_likewise(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message.replace("unfuse", "fuse")):
        fuse(make())


def test_fuse_says_what_it_left_and_why() -> None:
    act = ShapedActivation(SPEC)
    net = nn.Sequential(nn.Linear(6, 6), act, nn.Tanh(), ShapedActivation(SPEC), nn.Linear(6, 6))
    rows = {row.path: row for row in fuse(net)}
    assert rows["0"].now == "ShapedLinear"
    assert (rows["3"].now, rows["3"].note) == (
        "ShapedActivation",
        "not fused: its input comes from Tanh",
    )
    two = nn.Sequential(nn.Linear(6, 6), act, nn.Tanh(), act)
    assert [row.now for row in fuse(two)] == ["ShapedActivation"]
    other = nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), ShapedActivation(shaped("tanh")))
    fuse(other)
    assert [other[i].spec.activation for i in (0, 2)] == ["softplus", "tanh"]


def test_tools_that_go_by_class() -> None:
    """K-FAC and per-sample gradients by hooks: Gᵀ A is the weight's gradient, or nothing is."""
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(6, 6), nn.ReLU()))).double()
    convert(net, method="DKS", activation="tanh")

    def factors() -> list[tuple[Tensor, Tensor]]:
        inputs: dict[nn.Module, Tensor] = {}
        found: list[tuple[Tensor, Tensor]] = []
        handles = []
        for m in net.modules():
            if isinstance(m, nn.Linear):
                keep = lambda m, args: inputs.__setitem__(m, args[0].detach())  # noqa: E731
                handles.append(m.register_forward_pre_hook(keep))
                pair = lambda m, gin, gout: found.append((gout[0].T @ inputs[m], m.weight))  # noqa: E731
                handles.append(m.register_full_backward_hook(pair))
        net.zero_grad()
        net(ROW.clone().requires_grad_()).square().sum().backward()
        for handle in handles:
            handle.remove()
        return [(product, weight.grad) for product, weight in found]

    assert factors() == []
    unfuse(net)
    pairs = factors()
    assert len(pairs) == 4
    for product, grad in pairs:
        torch.testing.assert_close(product, grad, rtol=1e-12, atol=1e-12)


def test_quantisation_skips_fused_layers_and_takes_unfused_ones() -> None:
    net = nn.Sequential(ShapedLinear(64, 64, spec=SPEC), ShapedConv2d(1, 1, 1, spec=SPEC))[:1]
    quantise: Any = torch.ao.quantization.quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is to move to another package
        left = quantise(net, {nn.Linear}, dtype=torch.qint8)
        assert type(left[0]) is ShapedLinear
        unfuse(net)
        done = quantise(net, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert type(done[0]).__module__.startswith("torch.ao.nn.quantized")
    error = (done(x) - net(x)).norm() / net(x).norm()
    assert error < 0.02, "eight bits: 1/127 of the largest number a rounding, of inputs and weights"


def test_batchnorm_is_not_folded_into_a_fused_layer() -> None:
    """torch.nn.utils.fusion takes any module for a convolution."""
    conv = ShapedConv2d(3, 4, 3, spec=SPEC).eval()
    with pytest.raises(TypeError, match=r"fuse_conv_bn_eval: .* ShapedConv2d the activation comes"):
        fusion.fuse_conv_bn_eval(conv, nn.BatchNorm2d(4).eval())  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"fuse_linear_bn_eval: .*unfuse the model first"):
        fusion.fuse_linear_bn_eval(layer().eval(), nn.BatchNorm1d(6).eval())  # type: ignore[type-var]
    assert copy.deepcopy(nn.Sequential(conv))[0].spec == SPEC


def small(fused: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(6, 3)).double()
    convert(net, method="DKS", activation="tanh", fuse=fused)
    return net


def test_kfac_refuses_fused_layers_and_is_right_on_unfused_ones() -> None:
    curvlinops = pytest.importorskip("curvlinops")

    def kfac(net: nn.Module) -> Tensor:
        data = [(ROW, ROW[:, :3])]
        how = {"fisher_type": "empirical"}
        operator = curvlinops.KFACLinearOperator(
            net, nn.MSELoss(), list(net.parameters()), data, **how
        )
        return operator @ torch.eye(operator.shape[1], dtype=torch.float64)  # type: ignore[no-any-return]

    net = small(fused=True)
    with pytest.raises(NotImplementedError, match="un-supported layers"):
        kfac(net)
    unfuse(net)
    torch.testing.assert_close(kfac(net), kfac(small(fused=False)), rtol=1e-9, atol=1e-12)


def test_backpack_skips_fused_layers_and_is_right_on_unfused_ones() -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")

    def per_sample(net: nn.Module) -> dict[str, Tensor]:
        net.zero_grad()
        x = ROW.clone().requires_grad_()
        loss = backpack.extend(nn.MSELoss())(backpack.extend(net)(x), ROW[:, :3])
        with backpack.backpack(extensions.BatchGrad()):
            loss.backward()
        pairs = net.named_parameters()
        return {name: p.grad_batch.sum(0) - p.grad for name, p in pairs if hasattr(p, "grad_batch")}

    with pytest.warns(UserWarning, match="does not have an extension for Module.*ShapedLinear"):
        assert list(per_sample(small(fused=True))) == ["6.weight", "6.bias"]
    net = small(fused=True)
    unfuse(net)
    found = per_sample(net)
    assert list(found) == [name for name, _ in net.named_parameters()]
    for error in found.values():
        assert error.abs().max() < 1e-12


def test_adapters_refuse_fused_layers_and_are_right_on_unfused_ones() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU()))).double()
    net = copy.deepcopy(plain)
    convert(net, method="EOC", activation="tanh")
    config = peft.LoraConfig(r=2, target_modules=["0", "2", "4"], init_lora_weights=False)
    with pytest.raises(ValueError, match=r"ShapedLinear.*is not supported"):
        peft.get_peft_model(copy.deepcopy(net), config)
    unfuse(net)
    adapted = peft.get_peft_model(net, config).eval()
    want = adapted(ROW)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ROW), want, rtol=1e-9, atol=1e-9)
    fuse(merged)
    assert sum(isinstance(m, FusedLayer) for m in merged.modules()) == 3
    torch.testing.assert_close(merged(ROW), want, rtol=1e-9, atol=1e-9)
