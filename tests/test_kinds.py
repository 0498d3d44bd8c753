"""The table of layer kinds: nobody else asks for classes of layers, and all know a new row."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedshape
from fusedshape import kinds
from fusedshape.faithful import inputs_for
from fusedshape.init import init_module_
from fusedshape.kinds import KINDS, Kind, features, kind_of, matrices, phases, zeros_around
from fusedshape.spec import ActSpec
from fusedshape.theory import trace_wiring
from fusedshape.tracing import trace

PACKAGE = Path(fusedshape.__file__).parent
PLAIN = {kind.plain.__name__ for kind in KINDS}
BASES = {"_ConvNd", "_ConvTransposeNd", "LazyLinear"}
SHAPED = {kind.shaped.__name__ for kind in KINDS if kind.shaped is not None}
# Where a kind's twin is defined, and where people get it from.
HOMES = {"kinds.py", "nn.py", "__init__.py"}


def class_tests(path: Path) -> list[str]:
    """Where a file names a layer's class other than to make one."""
    tree = ast.parse(path.read_text())
    made = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    imports = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in made:
            continue
        of_torch = isinstance(node, ast.Attribute) and node.attr in PLAIN | BASES | SHAPED
        by_name = isinstance(node, ast.Name) and node.id in (PLAIN | BASES | SHAPED) & imports
        if of_torch or by_name:
            found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return found


def test_no_class_of_a_layer_is_asked_for_outside_the_table() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if str(path.relative_to(PACKAGE)) not in HOMES]
    assert len(files) > 90
    assert [place for path in files for place in class_tests(path)] == []


def test_the_search_finds_what_it_looks_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "bad.py"
    path.write_text(
        "from torch import nn\nfrom torch.nn import Conv2d\n"
        "made = nn.Linear(1, 1)\nasked = isinstance(made, nn.Linear)\n"
        "other = type(made) is Conv2d\n"
    )
    assert class_tests(path) == ["bad.py:4", "bad.py:5"]


def test_nn_names_a_plain_class_only_to_say_whose_twin_it_defines() -> None:
    tree = ast.parse((PACKAGE / "nn.py").read_text())
    stated = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and [getattr(target, "id", "") for target in node.targets] == ["plain_class"]
    ]
    named = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in PLAIN
    ]
    assert [ast.dump(node) for node in named] == [ast.dump(node) for node in stated]
    assert {node.attr for node in named} == {k.plain.__name__ for k in KINDS if k.shaped}


class Toy(nn.Module):
    """A kind that torch does not have: y = 2 (W x + b), with attributes of its own names."""

    def __init__(self, wide: int, tall: int, bias: bool = True, device: Any = None) -> None:
        super().__init__()
        self.wide, self.tall = wide, tall
        self.weight = nn.Parameter(torch.empty(tall, wide, device=device))
        self.bias = nn.Parameter(torch.zeros(tall, device=device)) if bias else None
        if device is None:
            nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Kind:
    row = Kind(Toy, "toy", sizes=("wide", "tall"))
    monkeypatch.setattr(kinds, "KINDS", (*KINDS, row))
    return row


def test_one_row_makes_a_new_kind_known_to_all_who_ask(toy: Kind) -> None:
    torch.manual_seed(0)
    layer = Toy(6, 4)
    assert kind_of(layer) is toy
    assert features(layer) == (6, 4)
    # the initialiser
    init_module_(layer)
    assert torch.allclose(layer.weight @ layer.weight.T, torch.eye(4), atol=1e-5)
    # tracing: a layer that nobody uses is dropped; an input that fits; the wiring
    model = nn.Sequential(Toy(6, 8), nn.ReLU(), Toy(8, 3))
    args = inputs_for(model)
    assert args is not None
    assert args[0].shape[1] == 6
    wiring = trace_wiring(model)
    assert [node.op for node in wiring.nodes] == ["input", "affine", "nonlinear", "affine"]
    # convert: initialised, its activation beside it, as it has no fused twin
    report = fusedshape.convert(model, eta=0.2)
    assert type(model[0]) is Toy
    assert isinstance(model[1], fusedshape.ShapedActivation)
    assert "Toy has no fused form" in str(report)
    assert model[0].weight.float().pow(2).sum().item() == pytest.approx(8, rel=1e-4)
    # fold: constants go into its weights
    x = torch.randn(5, 6)
    folded = fusedshape.fold(model, example=x)
    assert [type(m) for m in folded.children()] == [Toy, nn.LeakyReLU, Toy]
    assert torch.allclose(folded(x), model(x), atol=1e-5)
    # diagnose and the tap
    assert fusedshape.diagnose(model, torch.randn(64, 6)).layers
    with fusedshape.tap(model) as tapped:
        model(x).sum().backward()
    assert len(tapped) == 2


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Toy(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return x.relu()


def test_a_call_of_a_new_kind_that_nobody_uses_is_dropped(toy: Kind) -> None:
    (graph,) = trace(Unused())
    assert not graph.find_nodes(op="call_module", target="layer")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.plain.__name__)
def test_rows_say_what_torchs_classes_have(kind: Kind) -> None:
    make: Any = kind.plain
    kernel = (3,) if kind.dimensions else ()
    layer = make(4, 6, *kernel)
    assert features(layer) == (4, 6)
    x = torch.randn(2, 4, *[5] * kind.dimensions)
    outputs = layer(x)
    assert all(outputs.shape[dim] == 6 for dim in kind.channel_dims)
    blank = kind.blank(layer, bias=False)
    assert type(blank) is kind.plain
    assert blank.bias is None
    assert blank.weight.is_meta
    assert blank.weight.shape == layer.weight.shape
    assert len(kind.phases(layer)) == kind.dimensions
    assert matrices(layer.weight, kind.groups(layer), kind.transposed).shape[1:3] == (6, 4)
    function: Any = getattr(F, kind.function)
    assert torch.equal(function(x, layer.weight, layer.bias), outputs)


def test_blank_keeps_the_geometry() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), dilation=2, groups=2)
    blank: Any = kind_of(conv).blank(conv, bias=True)  # type: ignore[union-attr]
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(blank, name) == getattr(conv, name)


def test_matrices_is_a_view_and_phases_cover_every_tap_once() -> None:
    weight = torch.zeros(6, 4, 4, 5).to(memory_format=torch.channels_last)
    parts = matrices(weight, 2, transposed=True)
    assert parts.shape == (2, 4, 3, 4, 5)
    for taps in phases((2, 3)):
        parts[(slice(None),) * 3 + taps] += 1
    assert torch.equal(weight, torch.ones_like(weight))


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize(
    ("layer", "pads"),
    [
        (nn.Conv1d(1, 1, 3, padding=2), [2, 2]),
        (nn.Conv2d(1, 1, (3, 5), padding=(1, 2)), [2, 2, 1, 1]),
        (nn.Conv1d(1, 1, 4, padding="same", dilation=3), [4, 5]),
        (nn.Conv1d(1, 1, 3, padding="valid"), []),
        (nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), []),
        (nn.ConvTranspose1d(1, 1, 3, padding=1), []),
        (nn.Linear(1, 1), []),
        (nn.ReLU(), []),
    ],
)
def test_zeros_around(layer: nn.Module, pads: list[int]) -> None:
    assert zeros_around(layer) == pads
    if pads:
        x = torch.randn(1, 1, *[7] * (layer.weight.ndim - 2))
        plain: Any = kind_of(layer).blank(layer, bias=True, padding=0)  # type: ignore[union-attr]
        plain.weight, plain.bias = layer.weight, layer.bias
        assert torch.allclose(plain(F.pad(x, pads)), layer(x))


def test_a_subclass_that_names_a_plain_class_again_is_no_twin() -> None:
    class Other(fusedshape.ShapedConv2d):
        plain_class = nn.Conv2d

    spec = ActSpec("relu")
    kind = kind_of(Other(1, 1, 1, spec=spec))
    assert kind is not None
    assert kind.shaped is fusedshape.ShapedConv2d


def test_nobody_below_knows_a_module_above_by_its_name() -> None:
    names = {f"fusedshape.{path.stem}" for path in PACKAGE.glob("*.py")} - {"fusedshape.__init__"}
    places = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Compare, ast.Call)):
                parts = [p for p in ast.walk(node) if isinstance(p, ast.Constant)]
                asks = isinstance(node, ast.Compare) or getattr(node.func, "attr", "") in (
                    "startswith",
                    "endswith",
                )
                if asks and any(p.value in names for p in parts):
                    places.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert places == []


@pytest.mark.parametrize("name", ["ShapedLinear", "ShapedActivation", "PerLocationNorm"])
def test_a_forward_of_ones_own_is_followed(name: str) -> None:
    cls: Any = getattr(fusedshape, name)
    other = type("Other", (cls,), {"forward": lambda self, x: x + 1})
    assert kinds.is_leaf(cls.forward)
    assert not kinds.is_leaf(other.forward)
