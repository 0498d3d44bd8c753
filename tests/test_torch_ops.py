"""The table of operation names: torch does what it says, and nobody else keeps such a table."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedshape
from fusedshape import torch_ops
from fusedshape.nodes import is_query
from fusedshape.theory.network import Op
from fusedshape.torch_ops import (
    ALIASES,
    CASTS,
    COPIES,
    MODULES,
    MOVES,
    PARTS,
    QUERIES,
    RESIZES,
    VIEWS,
    base,
    function_of,
)

PACKAGE = Path(fusedshape.__file__).parent
SETS = {
    name: value
    for name, value in vars(torch_ops).items()
    if isinstance(value, (set, frozenset)) and name.isupper() and not name.startswith("_")
}
# Of other libraries.
FOREIGN = {"rearrange", "stochastic_depth", "drop_path", "checkpoint"}
# Attributes of instances, Python's own, and what only modules do.
NO_NAMES = {"identity", "data", "circular_pad", "constant_pad", "getattr"}
# Of the activations' own table.
ACTIVATIONS = {name for name in torch_ops.NONLINEAR if name not in torch_ops.ATTENTION}


def exists(name: str) -> bool:
    """Whether torch has a function, method, attribute or operator of a name in the table."""
    homes = (torch, F, Tensor, operator, torch.utils)
    names = [name, *(f"{name}{n}d" for n in (1, 2, 3)), f"_{name}", f"{name}_", f"{name}d"]
    middle = [name.replace("_", f"{n}d_", 1) for n in (1, 2, 3)]
    parts = name.split("_")
    inner = ["_".join([*parts[:i], f"{parts[i]}2d", *parts[i + 1 :]]) for i in range(len(parts))]
    names += [*middle, *inner, *(f"_{n}" for n in inner)]
    aten = torch.ops.aten
    found = any(hasattr(home, n) for home in homes for n in names)
    return found or any(hasattr(aten, n) for n in names) or hasattr(torch._refs, name)


@pytest.mark.parametrize("name", sorted(set().union(*SETS.values()) - FOREIGN - NO_NAMES))
def test_torch_has_every_name(name: str) -> None:
    assert exists(name)


X = torch.arange(1.0, 33.0).reshape(2, 4, 2, 2)
# A call of each that has special arguments; the others take none.
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "to": lambda x: x.to(torch.float32),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(x),
    "double": lambda x: x.double().float(),
    "half": lambda x: x.half().float(),
    "bfloat16": lambda x: x.bfloat16().float(),
    "data": lambda x: x.data,
    "requires_grad": lambda x: x.requires_grad_(False),
    "pos": operator.pos,
    "view": lambda x: x.view(2, -1),
    "view_as": lambda x: x.view_as(x),
    "reshape": lambda x: x.reshape(2, -1),
    "reshape_as": lambda x: x.reshape_as(x),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "movedim": lambda x: x.movedim(1, 2),
    "moveaxis": lambda x: x.moveaxis(1, 2),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "swapdims": lambda x: x.swapdims(1, 2),
    "t": lambda x: x[:, :, 0, 0].t(),
    "T": lambda x: x[:, :, 0, 0].T,
    "mT": lambda x: x.mT,
    "H": lambda x: x[:, :, 0, 0].H,
    "mH": lambda x: x.mH,
    "chunk": lambda x: x.chunk(2),
    "split": lambda x: x.split(1),
    "split_with_sizes": lambda x: x.split_with_sizes([1, 1]),
    "tensor_split": lambda x: x.tensor_split(2),
    "hsplit": lambda x: x.hsplit(2),
    "vsplit": lambda x: x.vsplit(2),
    "dsplit": lambda x: x.dsplit(2),
    "narrow": lambda x: x.narrow(1, 0, 2),
    "select": lambda x: x.select(1, 0),
    "getitem": lambda x: x[:, 1:],
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "real": lambda x: x.real,
    "expand": lambda x: x.expand(3, -1, -1, -1, -1) if x.ndim == 5 else x.expand(2, 4, 2, 2),
    "expand_as": lambda x: x.expand_as(x),
    "broadcast_to": lambda x: x.broadcast_to(2, 4, 2, 2),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2)),
    "dropout": lambda x: F.dropout(x, training=False),
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=False),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=False),
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.5, False),
    "clone": lambda x: x.clone(),
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "fliplr": lambda x: x.fliplr(),
    "flipud": lambda x: x.flipud(),
    "repeat": lambda x: x.repeat(1, 1, 1, 1),
    "tile": lambda x: x.tile(1),
    "repeat_interleave": lambda x: x.repeat_interleave(1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: torch.channel_shuffle(x, 2),
    "native_channel_shuffle": lambda x: torch.native_channel_shuffle(x, 2),
    "index": lambda x: torch.ops.aten.index(x, [torch.tensor([0])]),
    "index_select": lambda x: x.index_select(1, torch.tensor([0])),
    "gather": lambda x: x.gather(1, torch.zeros(2, 1, 2, 2, dtype=torch.long)),
    "take_along_dim": lambda x: x.take_along_dim(torch.zeros(1, 1, 1, 1, dtype=torch.long), 1),
    "im2col": lambda x: F.unfold(x, 1),
    "col2im": lambda x: F.fold(F.unfold(x, 1), (2, 2), 1),
    "fold": lambda x: F.fold(F.unfold(x, 1), (2, 2), 1),
    "reflection_pad": lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    "replication_pad": lambda x: F.pad(x, (1, 1, 1, 1), "replicate"),
    "circular_pad": lambda x: F.pad(x, (1, 1, 0, 0), "circular"),
}
INSIDE = {"alias", "unsafe_view", "reshape_alias", "lift_fresh", "lift_fresh_copy", "to_copy"}
INSIDE |= {"slice", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "numpy_T"}
INSIDE |= {"identity", "getattr", "cuda", *FOREIGN}


def result(name: str) -> list[Tensor]:
    out = CALLS[name](X) if name in CALLS else getattr(X, name)()
    return list(out) if isinstance(out, (tuple, list)) else [out]


def shares(out: list[Tensor]) -> bool:
    return any(t.untyped_storage().data_ptr() == X.untyped_storage().data_ptr() for t in out)


@pytest.mark.parametrize("name", sorted(ALIASES - INSIDE - {"double", "half", "bfloat16"}))
def test_aliases_may_share_memory(name: str) -> None:
    assert shares(result(name))


@pytest.mark.parametrize("name", sorted((MOVES | COPIES) - INSIDE))
def test_moves_and_copies_have_memory_of_their_own(name: str) -> None:
    assert not shares(result(name))


@pytest.mark.parametrize("name", sorted((VIEWS | MOVES | CASTS | COPIES) - INSIDE - {"contiguous"}))
def test_they_only_move_numbers(name: str) -> None:
    values = set(X.flatten().tolist())
    assert all(set(part.flatten().tolist()) <= values for part in result(name))


@pytest.mark.parametrize("name", sorted(PARTS - INSIDE))
def test_parts_are_several(name: str) -> None:
    assert len(result(name)) > 1


def test_the_same_name_has_one_meaning() -> None:
    alone = ["QUERIES", "CASTS", "COPIES", "RESHAPES", "TURNS", "CUTS", "SPREADS", "MOVES", "PADS"]
    alone += [
        "RESIZES",
        "BLOCKS",
        "POOLS",
        "DROPOUTS",
        "ALPHA_DROPOUTS",
        "NORMS",
        "SUMS",
        "DIFFERENCES",
    ]
    alone += ["PRODUCTS", "QUOTIENTS", "CONCATS", "MATMULS", "SOFTMAXES", "ATTENTION", "NEW"]
    seen: dict[str, str] = {}
    for title in alone:
        for name in SETS[title]:
            assert name not in seen or name == "type", f"{name} is in {seen[name]} and {title}"
            seen[name] = title
    assert set().union(*SETS.values()) <= {*seen, *torch_ops.SAME, *ACTIVATIONS, "getattr", "neg"}


@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_every_module_goes_by_a_name_of_the_table(cls: Any) -> None:
    known = set().union(*SETS.values()) | {"local_response_norm", "glu"}
    assert base(MODULES[cls]) in known


def test_every_stateless_module_of_torch_is_in_the_table() -> None:
    files = ("dropout", "pooling", "padding", "pixelshuffle", "channelshuffle", "fold", "flatten")
    files += ("upsampling",)
    for name, cls in vars(nn).items():
        if not isinstance(cls, type) or cls.__module__.rpartition(".")[2] not in files:
            continue
        module = cls.__new__(cls)
        assert function_of(module), f"nn.{name} is in no table"


class Own(nn.Flatten):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_subclass_with_a_forward_of_its_own_has_no_name() -> None:
    assert function_of(nn.UpsamplingNearest2d(scale_factor=2)) == "interpolate"
    assert function_of(Own()) == ""
    assert function_of(None) == ""


OPS = set(get_args(Op))  # the theory's own words, some of which are the same


def literals(path: Path) -> list[str]:
    """Where a file lists three or more names of the table."""
    known = set().union(*SETS.values()) - ACTIVATIONS
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.Set, ast.List, ast.Tuple)):
            continue
        names = {e.value for e in node.elts if isinstance(e, ast.Constant)}
        if len({n for n in names - OPS if isinstance(n, str) and base(n) in known}) > 2:
            found.append(f"{path.name}:{node.lineno}")
    return found


def test_nobody_else_keeps_a_set_of_operation_names() -> None:
    # What operators of Python are tensors, and what describes a tensor, are other questions.
    others = {"torch_ops.py", "nodes.py"}
    files = [path for path in PACKAGE.rglob("*.py") if path.name not in others]
    places = [place for path in files for place in literals(path)]
    assert places == []


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text('VIEWS = {"view", "reshape2d", "permute"}\nfine = {"view", "relu", "tanh"}\n')
    assert literals(path) == ["bad.py:1"]


def query(function: Callable[[Any], Any]) -> bool:
    graph = torch.fx.Graph()
    x = torch.fx.Proxy(graph.placeholder("x"))
    return is_query(function(x).node)


def test_queries() -> None:
    assert query(lambda x: x.type())
    assert query(lambda x: x.size(0))
    assert query(lambda x: x.shape)
    assert query(lambda x: x.is_floating_point())
    assert not query(lambda x: x.type(torch.half))
    assert not query(lambda x: x.type(dtype=torch.half))
    assert not query(lambda x: x.T)
    assert "type" in QUERIES
    assert RESIZES
