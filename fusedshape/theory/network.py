r"""Networks as the theory sees them: callables ``subnet_max(x, r)``, and `Wiring`, made of nodes.

Push a number x through the wiring, with every nonlinear layer replaced by r, every normalised sum
Σ wᵢuᵢ (Σ wᵢ² = 1) by Σ wᵢ²vᵢ, every concatenation of nᵢ channels by Σ (nᵢ/n)vᵢ, and affine layers,
pooling and dropout left out; the largest value that the net or any of its subnetworks reaches is
M(x). It is M_{f,r}(x) of Zhang, Botev and Martens, "Deep Learning without Shortcuts: Shaping the
Kernel with Tailored Rectifiers", arXiv 2203.08120. One recursion serves every method: r(y) = C(y)
gives C_f, r(y) = s·y the slope C_f′(1), and r(y) = t + y the curvature C_f″(1).

A subnetwork is what lies between two connections of the graph if nothing else leads in or out. All
three r are increasing with r(y) ≥ y, so a subnetwork that can be made longer is never the largest;
what remains is the whole net and, between every fork and the place where it joins, each branch by
itself, started at x.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Literal, get_args

from fusedshape.spec import ActSpec
from fusedshape.validate import instance, real, shown

LayerMap = Callable[[float], float]
SubnetMax = Callable[[float, LayerMap], float]
Op = Literal[
    "input",
    "affine",
    "nonlinear",
    "sum",
    "concat",
    "pool",
    "reshape",
    "dropout",
    "norm",
    "unknown",
]

# How far from 1 the squared weights of a sum may add up, for weights that were rounded: q drifts by
# as much at each sum.
_OFF_ONE = 1e-4
DEEPEST = 10**12  # plain chain
_LONGEST_LOOP = 10**7
#: Blocks of each stage of a ResNet, by depth.
RESNET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


class UnreadableError(ValueError):
    """A wiring whose map is not known; the message names the place, and what to do."""


@dataclass(frozen=True)
class Node:
    r"""One step of a network.

    Attributes:
        op: "input" (x), "affine", "nonlinear" (r), "sum" (Σ wᵢ²vᵢ), "concat" (Σ (nᵢ/n)vᵢ), "norm"
            (a normalisation that keeps q at 1, such as LayerNorm), "pool", "reshape", "dropout", or
            "unknown", which may stand in a wiring but not be evaluated.
        inputs: indices of the nodes whose values it takes.
        weights: wᵢ of a sum, or nᵢ of a concat, one for each input; empty for a concat whose nᵢ
            are not known.
        path: where it stands in the model. For a module, its qualified name; otherwise the name of
            the module that computes it, a colon, and what is computed ("layer1.0:add").
        spec: φ of a nonlinear node, where the activation table has it.
        note: what else messages say of it; for an unknown node, why it is unknown and what to do.
    """

    op: Op
    inputs: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    path: str = ""
    spec: ActSpec | None = None
    note: str = ""


# A step (terms, count) adds up coefficient · slot over its terms and applies r count times. Slot 0
# is x, slot i + 1 the result of step i. A program is its steps, and the slots that leave it.
_Step = tuple[tuple[tuple[int, float], ...], int]
_Program = tuple[tuple[_Step, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Wiring:
    r"""A network as a graph, and as its own ``subnet_max``: see the top of this file.

    Args:
        nodes: in an order in which every node comes after its inputs.
        outputs: indices of the nodes that leave the network; default the last.
        notes: remarks of whoever read the model.

    Raises:
        ValueError: a graph with a cycle or loose ends, or a node that does not fit its op.

    Example:
        >>> block = (Node("input"), Node("nonlinear", (0,)), Node("sum", (0, 1), (0.6, 0.8)))
        >>> net = Wiring((*block, Node("nonlinear", (2,))))
        >>> net.depth, round(net(1.0, lambda y: 2 * y), 12)
        (2, 3.28)
    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _tuple("nodes", self.nodes, Node)
        _tuple("outputs", self.outputs, int)
        _tuple("notes", self.notes, str)
        if not self.nodes:
            raise ValueError("Wiring: needs at least one node, got nodes=()")
        if not self.outputs:
            object.__setattr__(self, "outputs", (len(self.nodes) - 1,))
        for i in self.outputs:
            if not 0 <= i < len(self.nodes):
                raise ValueError(f"Wiring: there is no node {i} to leave by")
        for i, node in enumerate(self.nodes):
            _check(i, node)

    def __call__(self, x: float, r: LayerMap) -> float:
        """M(x): the largest value that the network or a subnetwork reaches.

        Args:
            x: the value that enters.
            r: increasing, with r(y) ≥ y for y ≥ x.

        Raises:
            UnreadableError: an unknown node, a sum that is not normalised, or a concat of unknown
                proportions.
        """
        self.check()
        return _largest([v for program in self._programs for v in _run(program, x, r)])

    def whole(self, x: float, r: LayerMap) -> float:
        """The value that the whole network gives, without regard to subnetworks, for any r.

        If r is the C map of the layers and x the correlation of two inputs, this is the correlation
        of their outputs; the largest, if the network has several outputs.

        Args:
            x: the value that enters.
            r: what a nonlinear layer does to a value.

        Raises:
            UnreadableError: as for a call.
        """
        self.check()
        return _largest(_run(self._programs[0], x, r))

    @cached_property
    def live(self) -> tuple[int, ...]:
        """Indices of the nodes from which an output can be reached, with a weight other than 0."""
        alive = set(self.outputs)
        for i in range(len(self.nodes) - 1, -1, -1):
            if i in alive:
                alive.update(j for j, _ in _weighted(self.nodes[i]))
        return tuple(sorted(alive))

    @cached_property
    def depth(self) -> int:
        """Nonlinear layers on the longest path."""
        depths: dict[int, int] = {}
        for i in self.live:
            node = self.nodes[i]
            before = max((depths[j] for j, _ in _weighted(node)), default=0)
            depths[i] = before + (node.op == "nonlinear")
        return max(depths[i] for i in self.outputs)

    @property
    def label(self) -> str:
        """A few words for messages and for `ActSpec.origin`."""
        if not self.depth:
            return "a wiring without nonlinear layers"
        is_chain = len(self._programs) == 1 and len(self._programs[0][0]) == 1
        return f"depth={self.depth}" if is_chain else f"wiring of depth {self.depth}"

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Why the wiring cannot be evaluated, one message for each node at fault."""
        return tuple(filter(None, (_problem(self.nodes[i]) for i in self.live)))

    @cached_property
    def unmixed(self) -> tuple[str, ...]:
        """Paths of nonlinear layers that take another one's output with no affine layer between.

        Their input is not Gaussian with mean 0, as the maps assume, so q drifts from 1. Residual
        blocks that activate the sum of branch and identity ("v1") are an example.
        """
        found = []
        carries: dict[int, bool] = {}
        for i in self.live:
            node = self.nodes[i]
            takes = any(carries[j] for j, _ in _weighted(node))
            if node.op == "nonlinear":
                found += [node.path] * takes
            carries[i] = node.op == "nonlinear" or (takes and node.op not in ("affine", "norm"))
        return tuple(found)

    def check(self) -> None:
        """Raise if the wiring cannot be evaluated.

        Raises:
            UnreadableError: see `problems`.
        """
        if self.problems:
            first, *more = self.problems
            others = f" (and {len(more)} more like this, see Wiring.problems)" if more else ""
            raise UnreadableError(first + others)

    def normalized(self) -> Wiring:
        """The wiring with every sum's weights scaled until their squares add up to 1.

        For a model whose sums will be normalised later.

        Example:
            >>> layers = Node("input"), Node("nonlinear", (0,))
            >>> plain = Wiring((*layers, Node("sum", (0, 1), (1.0, 1.0))))
            >>> round(plain.normalized()(0.0, lambda y: y + 1), 12)
            1.0
        """

        def scaled(node: Node) -> Node:
            total = math.sqrt(math.fsum(w * w for w in node.weights))
            if node.op != "sum" or total == 0:
                return node
            return replace(node, weights=tuple(w / total for w in node.weights))

        return replace(self, nodes=tuple(map(scaled, self.nodes)))

    @cached_property
    def _programs(self) -> tuple[_Program, ...]:
        """The whole net, and every branch by itself."""
        mixes = self._contracted()
        leaving = [self._alias[i] for i in self.outputs]
        whole = _program(sorted(mixes), mixes, self._is_nonlinear, leaving)
        branches = [
            _program(sorted(inside), mixes, self._is_nonlinear, [last])
            for inside, last in _branches(mixes, leaving)
        ]
        return tuple(dict.fromkeys([whole, *branches]))

    def _is_nonlinear(self, i: int) -> bool:
        return self.nodes[i].op == "nonlinear"

    @cached_property
    def _alias(self) -> dict[int, int]:
        """The node whose value each live node has."""
        alias: dict[int, int] = {}
        for i in self.live:
            mix = _weighted(self.nodes[i])
            same = len(mix) == 1 and not self._is_nonlinear(i)
            alias[i] = alias[mix[0][0]] if same else i
        return alias

    def _contracted(self) -> dict[int, list[tuple[int, float]]]:
        """Nodes that make a value of their own: what they take, and with which coefficients."""
        alias = self._alias
        return {
            i: [(alias[j], c) for j, c in _weighted(self.nodes[i])] for i in alias if alias[i] == i
        }


def _weighted(node: Node) -> list[tuple[int, float]]:
    """A node's inputs with coefficients that add up to 1; inputs of coefficient 0 are left out."""
    if len(node.inputs) == 1:
        return [(node.inputs[0], 1.0)]
    shares = [w * w for w in node.weights] if node.op == "sum" else list(node.weights)
    # An infinite value times 0 would make the whole sum nan.
    total = math.fsum(shares) or 1.0
    shares = shares or [1.0] * len(node.inputs)
    return [(j, s / total) for j, s in zip(node.inputs, shares, strict=True) if s]


def _tuple(name: str, values: object, kind: type) -> None:
    """Raise unless `values` is a tuple of a class."""
    if not isinstance(values, tuple) or not all(isinstance(v, kind) for v in values):
        what = "values" if kind is object else f"{kind.__name__}s"
        raise TypeError(f"Wiring: {name} must be a tuple of {what}, got {shown(values)}")


def _check(i: int, node: Node) -> None:
    """Raise if node i of a wiring does not fit its op."""
    _tuple("inputs", node.inputs, int)
    _tuple("weights", node.weights, object)
    instance("Wiring", "path", node.path, str)
    instance("Wiring", "note", node.note, str)
    instance("Wiring", "spec", node.spec, ActSpec, optional=True)
    where = f"Wiring: node {i} ({node.op}{f' {node.path!r}' if node.path else ''})"
    if not isinstance(node.op, str) or node.op not in get_args(Op):
        raise ValueError(f"{where}: unknown op; known: {', '.join(get_args(Op))}")
    for j in node.inputs:
        if not 0 <= j < i:
            raise ValueError(
                f"{where} takes from node {j}, which does not come before it: a wiring has no "
                "cycles, unroll what is recurrent"
            )
    many = node.op in ("sum", "concat")
    if node.op != "unknown" and not (node.inputs if many else len(node.inputs) == _arity(node)):
        raise ValueError(f"{where} takes {len(node.inputs)} inputs; it needs {_arity(node)}")
    known = node.weights or node.op == "sum"
    if many and known and len(node.weights) != len(node.inputs):
        raise ValueError(f"{where} has {len(node.weights)} weights for {len(node.inputs)} inputs")
    if not all(math.isfinite(real("Wiring", "weights", w)) for w in node.weights):
        raise ValueError(f"{where}: weights must be finite, got {node.weights}")
    if node.op == "concat" and node.weights and min(node.weights) <= 0:
        raise ValueError(f"{where}: numbers of channels must be positive, got {node.weights}")


def _arity(node: Node) -> int:
    return 0 if node.op == "input" else 1


def _problem(node: Node) -> str:
    """Why a node's map is not known; "" if it is."""
    if node.op == "unknown":
        why = node.note or "nothing is known about it"
        return f"{_at(node)} cannot be read: {why}"
    if node.op == "concat" and not node.weights:
        return (
            f"{_at(node)} joins channels in proportions that cannot be read off the model; pass "
            "trace_wiring an example input, and what it returns to convert as subnet_max"
        )
    total = math.fsum(w * w for w in node.weights)
    if node.op != "sum" or abs(total - 1) <= _OFF_ONE:
        return ""
    if len(node.weights) == 1:
        return (
            f"{_at(node)} multiplies by {node.weights[0]:.6g}, which takes the mean square away "
            "from 1; leave the factor out, or take wiring.normalized(), which does"
        )
    shown = ", ".join(f"{w:.6g}" for w in node.weights)
    return (
        f"{_at(node)} is a sum with weights ({shown}), whose squares add up to {total:.6g}, not to "
        "1; use fusedshape.nn.NormalizedSum there, or "
        "fusedshape.shortcuts.reweight_shortcuts(model, shortcut_weight), or take "
        "wiring.normalized() if you will scale the weights yourself"
    )


def _at(node: Node) -> str:
    return repr(node.path) if node.path else f"a node ({node.op}) without a path"


def _program(
    nodes: Iterable[int],
    mixes: dict[int, list[tuple[int, float]]],
    is_nonlinear: Callable[[int], bool],
    leaving: list[int],
) -> _Program:
    """Steps that compute some nodes in order; values of any other node count as x."""
    order = list(nodes)
    slots: dict[int, int] = {}
    terms: list[tuple[tuple[int, float], ...]] = []
    counts: list[int] = []
    users: dict[int, int] = defaultdict(int)
    for i in order:
        for j in {j for j, _ in mixes[i]}:
            users[j] += 1
    for i in leaving:
        users[i] += 1
    for i in order:
        if not mixes[i]:
            slots[i] = 0
            continue
        taken = [(slots.get(j, 0), c) for j, c in mixes[i]]
        (before, _), source = taken[0], mixes[i][0][0]
        if is_nonlinear(i) and before and users[source] == 1:
            # No other node uses the value before, so r is applied to its slot.
            counts[before - 1] += 1
            slots[i] = before
            continue
        terms.append(tuple(taken))
        counts.append(int(is_nonlinear(i)))
        slots[i] = len(terms)
    steps = tuple(zip(terms, counts, strict=True))
    return steps, tuple(dict.fromkeys(slots[i] for i in leaving))


def _run(program: _Program, x: float, r: LayerMap) -> list[float]:
    """The values that leave a program."""
    steps, leaving = program
    slots = [x]
    for terms, count in steps:
        (slot, coefficient), *more = terms
        value = slots[slot] if coefficient == 1 else coefficient * slots[slot]
        for slot, coefficient in more:
            value += coefficient * slots[slot]
        slots.append(_repeated(r, value, count))
    return [slots[slot] for slot in leaving]


@dataclass(frozen=True)
class Scaled:
    """r(y) = (1 + excess)·y, and its repetition in closed form."""

    excess: float

    def __call__(self, y: float) -> float:
        """r(y)."""
        return y + self.excess * y

    def repeated(self, y: float, count: int) -> float:
        """Apply r `count` times: (1 + excess)^count · y, infinite if that overflows."""
        try:
            return y * math.exp(count * math.log1p(self.excess))
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Shifted:
    """r(y) = y + excess, and its repetition in closed form."""

    excess: float

    def __call__(self, y: float) -> float:
        """r(y)."""
        return y + self.excess

    def repeated(self, y: float, count: int) -> float:
        """Apply r `count` times: y + count · excess."""
        return y + count * self.excess


def _repeated(r: LayerMap, y: float, count: int) -> float:
    """Apply r `count` times to y."""
    if isinstance(r, (Scaled, Shifted)):
        return r.repeated(y, count)
    if count > _LONGEST_LOOP:
        raise ValueError(
            f"depth={count} is beyond {_LONGEST_LOOP}, up to which r is applied layer by layer; "
            "take a shallower chain"
        )
    for _ in range(count):
        y = r(y)
    return y


def _largest(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _branches(
    mixes: dict[int, list[tuple[int, float]]], leaving: list[int]
) -> list[tuple[set[int], int]]:
    """The largest parts of the graph with one way in and one way out, except the whole graph.

    Each part is given as its nodes and the node whose value leaves it. Two connections enclose such
    a part if every path through the graph takes both or neither: with the output tied to the input,
    they lie on the same cycles (Johnson, Pearson and Pingali, "The program structure tree", PLDI
    1994). A spanning tree gives a basis of the cycles, one for each connection outside the tree.
    Each connection is labelled by the set of basis cycles that it lies on, as the bits of an int.
    """
    source, sink = -1, max(mixes) + 1
    edges = [(j, i) for i, mix in mixes.items() for j, _ in mix or [(source, 1.0)]]
    edges += [(i, sink) for i in dict.fromkeys(leaving)]
    tree: dict[int, int] = {}
    cycles: dict[int, int] = defaultdict(int)
    labels = [0] * len(edges)
    cycles[source] = cycles[sink] = whole = 1
    bit = 1
    for e, (i, j) in enumerate(edges):
        if j not in tree:
            tree[j] = e
            continue
        bit <<= 1
        labels[e] = bit
        cycles[i] ^= bit
        cycles[j] ^= bit
    for j in sorted(tree, reverse=True):
        labels[tree[j]] = cycles[j]
        cycles[edges[tree[j]][0]] ^= cycles[j]
    classes: dict[int, list[int]] = defaultdict(list)
    for e in sorted(range(len(edges)), key=lambda e: edges[e][0]):
        classes[labels[e]].append(e)
    classes.pop(whole, None)
    return [
        (_between(edges[es[0]][1], edges[es[-1]][0], mixes), edges[es[-1]][0])
        for es in classes.values()
        if len(es) > 1
    ]


def _between(first: int, last: int, mixes: dict[int, list[tuple[int, float]]]) -> set[int]:
    """All nodes on paths from first to last, where every path to last passes through first."""
    found, stack = {first}, [last]
    while stack:
        i = stack.pop()
        if i not in found:
            found.add(i)
            stack += [j for j, _ in mixes[i]]
    return found


@dataclass(frozen=True)
class Chain:
    """What `chain` returns.

    Attributes:
        depth: number of nonlinear layers.
    """

    depth: int

    def __call__(self, x: float, r: LayerMap) -> float:
        """Apply r `depth` times to x."""
        return _repeated(r, x, self.depth)

    @property
    def __name__(self) -> str:
        return f"depth={self.depth}"


def chain(depth: int) -> Chain:
    """Plain chain of `depth` nonlinear layers, r applied `depth` times.

    Solvers take it in closed form, up to 10¹² layers. Any other r is applied layer by layer, up to
    10⁷ of them.

    Args:
        depth: number of nonlinear layers, from 1 to 10¹².

    Returns:
        ``subnet_max(x, r)``.

    Raises:
        TypeError: depth is not an int.
        ValueError: depth is below 1 or beyond 10¹²; a call: beyond 10⁷ for an r of one's own.

    Example:
        >>> chain(3)(1.0, lambda y: 2 * y)
        8.0
    """
    if isinstance(depth, bool) or not isinstance(depth, Integral):
        raise TypeError(
            f"chain: depth must be an int, the number of nonlinear layers, got {shown(depth)}"
        )
    if depth < 1:
        raise ValueError(
            "chain: depth must be at least 1, the number of nonlinear layers, got "
            f"{shown(int(depth))}"
        )
    if depth > DEEPEST:
        raise ValueError(
            f"chain: depth={shown(int(depth))} is beyond {DEEPEST:.0e}: float64 has not the digits "
            "to tell layers of deeper chains from linear ones; take a shallower chain"
        )
    return Chain(int(depth))


def resnet(depth: int, shortcut_weight: float = 0.0) -> SubnetMax:
    r"""ResNet v2 of the given depth, its sums normalised: w·shortcut + √(1−w²)·branch.

    A branch holds two nonlinear layers (depth 18 and 34) or three. The first block of a group has
    an activation and a projection in its shortcut, except in the first group of depth 18 and 34,
    which needs no projection. The activation before the head counts; stem and pools do not.

    Args:
        depth: 18, 34, 50, 101, 152 or 200.
        shortcut_weight: w, 0 ≤ w < 1; 0 is the vanilla network.

    Returns:
        ``subnet_max(x, r)``.

    Raises:
        ValueError: another depth, or w outside [0, 1).

    Example:
        >>> resnet(50)(1.0, lambda y: y * 1.01) == chain(49)(1.0, lambda y: y * 1.01)
        True
    """
    if type(depth) is not int or depth not in RESNET_BLOCKS:
        raise ValueError(
            f"resnet: depth must be one of {sorted(RESNET_BLOCKS)}, got {shown(depth)}"
        )
    shortcut_weight = real("resnet", "shortcut_weight", shortcut_weight)
    if not 0 <= shortcut_weight < 1:
        raise ValueError(f"resnet: shortcut_weight must be in [0, 1), got {shortcut_weight}")
    deep = depth >= 50
    kept = shortcut_weight**2

    def branch(x: float, r: LayerMap) -> float:
        return r(r(r(x))) if deep else r(r(x))

    def subnet_max(x: float, r: LayerMap) -> float:
        alone = branch(x, r)
        for group, blocks in enumerate(RESNET_BLOCKS[depth]):
            for block in range(blocks):
                projected = block == 0 and (deep or group > 0)
                through = branch(x, r)
                # At weight 0 the shortcut is left out, as an infinite one would give 0·∞.
                x = kept * (r(x) if projected else x) + (1 - kept) * through if kept else through
        return max(r(x), alone)

    subnet_max.__name__ = f"resnet({depth}, {shortcut_weight:g})"
    return subnet_max
