"""Modules: drop-ins for the plain ones in every way a training script can tell."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fusedshape import (
    NormalizedSum,
    PerLocationNorm,
    ShapedActivation,
    ShapedChain,
    ShapedConv1d,
    ShapedConv2d,
    ShapedConv3d,
    ShapedLinear,
    reference,
)
from fusedshape.init import suo_
from fusedshape.kinds import KINDS, features, kind_of
from tests.support.specs import shaped

SPEC = shaped("softplus")
PAIRS = [
    (lambda: nn.Linear(4, 6), ShapedLinear, (5, 4)),
    (lambda: nn.Conv1d(4, 6, 3, padding="same"), ShapedConv1d, (2, 4, 9)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), ShapedConv2d, (2, 4, 9, 9)),
    (
        lambda: nn.Conv2d(4, 4, 3, groups=4, padding_mode="circular", padding=1),
        ShapedConv2d,
        (4, 5, 5),
    ),
    (lambda: nn.Conv3d(4, 6, (1, 2, 3), dilation=2), ShapedConv3d, (1, 4, 5, 5, 5)),
]


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: c[1].__name__)
def test_from_plain_shares_parameters_and_computes_the_same(case) -> None:  # type: ignore[no-untyped-def]
    make, cls, shape = case
    plain = make().double()
    seen: list[Tensor] = []
    plain.register_forward_hook(lambda module, args, out: seen.append(out))
    twin = cls.from_plain(plain, SPEC)
    assert not isinstance(twin, type(plain)), "its output is not the plain layer's"
    assert kind_of(twin) == kind_of(plain)
    assert dict(twin.named_parameters()) == dict(plain.named_parameters())
    assert list(twin.state_dict()) == list(plain.state_dict())
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = reference.shaped_act(plain(x), SPEC)
    torch.testing.assert_close(twin(x), want, rtol=1e-12, atol=1e-12)
    assert len(seen) == 2, "hooks come along"
    plain.load_state_dict(twin.state_dict())
    twin.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: c[1].__name__)
def test_copies_and_pickles(case) -> None:  # type: ignore[no-untyped-def]
    make, cls, shape = case
    twin = cls.from_plain(make(), SPEC)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(twin),
        pickle.loads(pickle.dumps(twin)),
        torch.load(buffer, weights_only=False),
    ):
        assert other.spec == SPEC
        assert other.weight is not twin.weight
        assert torch.equal(other(x), twin(x))


def test_from_plain_takes_its_own_parent_only() -> None:
    with pytest.raises(TypeError, match="needs a Conv2d, got Linear"):
        ShapedConv2d.from_plain(nn.Linear(1, 1), SPEC)
    twice = ShapedConv2d.from_plain(nn.Conv2d(1, 1, 1), SPEC)
    with pytest.raises(TypeError, match="needs a Conv2d, got ShapedConv2d"):
        ShapedConv2d.from_plain(twice, SPEC)


def test_weights_start_as_the_constants_assume() -> None:
    conv = ShapedConv2d(16, 32, 3, spec=SPEC)
    assert conv.bias is not None
    assert not conv.bias.any()
    centre = conv.weight.detach()[:, :, 1, 1].double()
    torch.testing.assert_close(centre.T @ centre, 2 * torch.eye(16).double(), rtol=1e-5, atol=1e-5)
    assert conv.weight.count_nonzero() == centre.count_nonzero()


def test_made_on_the_meta_device() -> None:
    """A model too large to be made twice starts on meta; weights are drawn once there is memory."""
    with torch.device("meta"):
        conv = ShapedConv2d(16, 32, 3, spec=SPEC)
    assert conv.weight.is_meta
    conv.to_empty(device="cpu")
    conv.reset_parameters()
    centre = conv.weight.detach()[:, :, 1, 1].double()
    torch.testing.assert_close(centre.T @ centre, 2 * torch.eye(16).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("container", [nn.Sequential, ShapedChain])
def test_a_net_trains(container: type[nn.Sequential], compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # one in forty of other weights does not train so fast
        torch.manual_seed(0)
        net = container(
            PerLocationNorm(),
            ShapedConv2d(3, 8, 3, padding=1, spec=SPEC),
            ShapedConv2d(8, 8, 3, padding=1, spec=SPEC),
            nn.Flatten(),
            ShapedLinear(8 * 16, 8, spec=SPEC),
            ShapedActivation(SPEC),
            nn.Linear(8, 1),
        )
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    x, y = torch.randn(16, 2, 4, 4, generator=generator), torch.randn(16, 1, generator=generator)
    losses = []
    for _ in range(20):
        loss = (run(x) - y).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("mode", ["one", "avg_q", "off"])
def test_per_location_norm(mode: str) -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    y = PerLocationNorm(mode)(x)  # type: ignore[arg-type]
    assert y.shape == (4, 3 + (mode != "off"), 5, 5)
    torch.testing.assert_close(y.square().mean(1), torch.ones(4, 5, 5))
    zero = PerLocationNorm(mode)(torch.zeros(1, 3, 2, 2, requires_grad=True))  # type: ignore[arg-type]
    zero.sum().backward()
    assert zero.isfinite().all()


def test_per_location_norm_matches_dks() -> None:
    pln = pytest.importorskip("dks.pytorch.data_preprocessing")
    x = torch.randn(4, 5, 5, 3, generator=torch.Generator().manual_seed(0))
    for mode in ("one", "avg_q"):
        want = pln.per_location_normalization(x, homog_mode=mode, homog_scale=0.7)
        got = PerLocationNorm(mode, 0.7)(x.movedim(-1, 1)).movedim(1, -1)  # type: ignore[arg-type]
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"homog_mode": "rms"}, "known:"), ({"homog_scale": 0}, "positive")]
)
def test_per_location_norm_refuses(kwargs, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        PerLocationNorm(**kwargs)


@pytest.mark.parametrize("weights", [(1.0,), (0.6, 0.8), (0.6, -0.8), (0.5,) * 4, (0.0, 1.0, 0.0)])
def test_normalized_sum(weights: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    branches = [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in weights]
    module = NormalizedSum(weights)
    want = sum(w * u for w, u in zip(weights, branches, strict=True))
    got = module(*branches)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    assert all(got is not u and got.data_ptr() != u.data_ptr() for u in branches)
    assert not list(module.parameters())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.weights == weights


def test_normalized_sum_keeps_q() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(3, 100_000, generator=generator)
    for w in (0.0, 0.3, 0.9, 1.0):
        q = NormalizedSum.shortcut(w)(u[0], u[1]).square().mean().item()
        assert q == pytest.approx(1, abs=0.03)  # 5 √(2 / 100,000)


def test_normalized_sum_leaves_branches_of_weight_0_out() -> None:
    x, bad = torch.ones(2, requires_grad=True), torch.full((2,), torch.inf, requires_grad=True)
    y = NormalizedSum((0, 1, 0))(bad, x, bad)
    y.sum().backward()
    assert torch.equal(y, x)
    assert bad.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalized_sum_in_half_precision_rounds_as_plain_sums_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, f = torch.randn(2, 1 << 16, generator=generator).to(dtype)
    eps = torch.finfo(dtype).eps
    for w in (0.3, 0.8, 0.95):
        module = NormalizedSum.shortcut(w)
        error = (module(x, f).double() - module(x.double(), f.double())).abs()
        # half a unit for each product and for the sum
        bound = 0.5 * eps * (2 * x.double().abs() + 2 * f.double().abs())
        assert (error <= bound).all()


def test_normalized_sum_compiles() -> None:
    net = nn.ModuleList(NormalizedSum.shortcut(w) for w in (0.1, 0.5, 0.0, 1.0))
    x, f = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)

    def run(x: Tensor) -> Tensor:
        for module in net:
            x = module(x, f)
        return x

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ((), ValueError, "needs a weight other than 0"),
        ((0, 0), ValueError, "needs a weight other than 0"),
        ((1, 1), ValueError, r"add up to 2, not to 1; .* \(0.707106\d*, 0.707106\d*\)"),
        ((0.7071, 0.7071), ValueError, "add up to 0.99998"),
        ((float("nan"), 1), ValueError, "must be finite"),
        (("1",), TypeError, "must be numbers, got '1'"),
    ],
)
def test_normalized_sum_refuses(weights, error, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        NormalizedSum(weights)


def test_normalized_sum_refuses_calls() -> None:
    with pytest.raises(ValueError, match=r"weight=-0.1 is outside"):
        NormalizedSum.shortcut(-0.1)
    module = NormalizedSum.shortcut(0.5)
    with pytest.raises(ValueError, match="got 1 branches for 2 weights"):
        module(torch.ones(2))
    with pytest.raises(ValueError, match=r"one shape, got \(2,\), \(1,\)"):
        module(torch.ones(2), torch.ones(1))


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: c[1].__name__)
def test_no_shaped_layer_passes_for_a_plain_one(case) -> None:  # type: ignore[no-untyped-def]
    """Adapters, K-FAC and quantisation test for nn.Linear and then expect an output of W x + b."""
    make, cls, _ = case
    plain = make()
    twin = cls.from_plain(plain, SPEC)
    assert not any(isinstance(twin, kind.plain) for kind in KINDS)
    assert not isinstance(twin, nn.modules.conv._ConvNd)
    assert features(twin) == features(plain)
    own = {name for name in vars(plain) if not name.startswith("_")}
    assert all(getattr(twin, name) == getattr(plain, name) for name in own)
    assert twin.extra_repr() == f"{plain.extra_repr()}, {SPEC}"


@pytest.mark.parametrize(
    ("cls", "args", "kwargs"),
    [
        (ShapedLinear, (3, 5), {}),
        (ShapedLinear, (3, 5, False), {"dtype": torch.float64}),
        (ShapedConv1d, (4, 6, 3, 2, 1), {"device": "meta"}),
        (ShapedConv2d, (4, 6, (3, 5)), {"padding": "same", "padding_mode": "reflect"}),
        (ShapedConv3d, (4, 6, 3, 1, 0, 2, 2, False, "circular", None, torch.bfloat16), {}),
    ],
)
def test_constructors_take_the_plain_ones_arguments(cls, args, kwargs) -> None:  # type: ignore[no-untyped-def]
    plain = cls.plain_class(*args, **kwargs)
    layer = cls(*args, **kwargs, spec=SPEC)
    assert layer.extra_repr() == f"{plain.extra_repr()}, {SPEC}"
    assert list(layer.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)


@pytest.mark.parametrize("cls", [ShapedLinear, ShapedConv1d, ShapedConv2d, ShapedConv3d])
def test_a_layer_without_constants_is_refused_by_name(cls: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{cls.__name__}: the argument spec is missing"):
        cls(3, 5, *((3,) if cls is not ShapedLinear else ()))


def test_torch_can_skip_the_initialisation() -> None:
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        conv = nn.utils.skip_init(ShapedConv2d, 3, 8, 3, padding=1, spec=SPEC)
        linear = nn.utils.skip_init(ShapedLinear, 3, 8, spec=SPEC, dtype=torch.float64)
        assert torch.equal(torch.get_rng_state(), before)
    assert (conv.weight.shape, conv.weight.device.type) == ((8, 3, 3, 3), "cpu")
    assert (linear.weight.dtype, linear.spec) == (torch.float64, SPEC)


def test_a_constructor_draws_the_weights_once() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = ShapedLinear(4, 6, spec=SPEC)
        after = torch.get_rng_state()
        torch.manual_seed(0)
        suo_(weight := torch.empty(6, 4))
        assert torch.equal(after, torch.get_rng_state())
    assert torch.equal(layer.weight, weight)


def test_kinds_of_layers() -> None:
    class Own(nn.Conv2d):
        pass

    class Bare(nn.modules.conv._ConvNd):
        pass

    none: tuple[int, int] = (0, 0)
    bare = Bare(2, 4, (3, 3), (1, 1), none, (1, 1), False, none, 1, True, "zeros")
    for layer in (Own(2, 4, 3), bare, ShapedConv2d(2, 4, 3, spec=SPEC)):
        kind = kind_of(layer)
        assert kind is not None
        assert (kind.plain, kind.dimensions, kind.transposed) == (nn.Conv2d, 2, False)
        assert features(layer) == (2, 4)
    transposed = kind_of(nn.ConvTranspose1d(2, 4, 3))
    assert transposed is not None
    assert transposed.transposed
    assert kind_of(ShapedActivation(SPEC)) is None
    assert kind_of(None) is None
    with pytest.raises(TypeError, match="ReLU is no linear or convolution layer"):
        features(nn.ReLU())


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: c[1].__name__)
def test_tools_that_go_by_attribute_work(case) -> None:  # type: ignore[no-untyped-def]
    """Reparametrisations and pruning, as on the plain layer."""
    make, cls, shape = case
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for change in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ):
        plain = make().double().eval()
        layer = cls.from_plain(copy.deepcopy(plain), SPEC)
        for module in (plain, layer):
            torch.manual_seed(0)
            change(module)
        plain.load_state_dict(layer.state_dict())
        want = reference.shaped_act(plain(x), SPEC)
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
