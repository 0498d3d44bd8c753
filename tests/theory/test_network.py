"""Network maps: facts about depth, the official ResNets, and what shallow nets cannot reach."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies as st

from fusedshape import ActSpec
from fusedshape.theory import Node, UnreadableError, Wiring, chain, resnet, solve
from fusedshape.theory.maps import leaky_c_map


def relu(c: float) -> float:
    return leaky_c_map(0.0, c)


@pytest.mark.parametrize(
    ("depth", "c"), [(10, 0.8715), (49, 0.98744), (100, 0.99642), (200, 0.99902)]
)
def test_relu_forgets_angles(depth: int, c: float) -> None:
    assert chain(depth)(0.0, relu) == pytest.approx(c, abs=0.6 * 10 ** -len(f"{c}"[2:]))


def test_relu_forgets_as_one_over_depth_squared() -> None:
    # 1 − c ~ 9π²/(2L²), to first order in the logarithm of L over L.
    for depth in (1000, 10_000, 100_000):
        ratio = (1 - chain(depth)(0.0, relu)) * 2 * depth**2 / (9 * math.pi**2)
        assert abs(ratio - 1) < 6 * math.log(depth) / depth


@pytest.mark.parametrize(
    ("depth", "layers"), [(18, 17), (34, 33), (50, 49), (101, 100), (152, 151), (200, 199)]
)
def test_vanilla_resnets_are_chains(depth: int, layers: int) -> None:
    for x, r in ((0.0, relu), (1.0, lambda y: 1.01 * y), (0.0, lambda y: 0.01 + y)):
        assert resnet(depth)(x, r) == chain(layers)(x, r)


def test_shortcuts_keep_angles() -> None:
    values = [resnet(50, w)(0.0, relu) for w in (0.0, 0.3, 0.6, 0.9, 0.99)]
    assert values == sorted(values, reverse=True)
    # The largest a weighted graph can reach.
    assert resnet(50, 0.9)(0.0, relu) == pytest.approx(0.8879, abs=5e-5)
    assert resnet(18, 0.8)(0.0, relu) == pytest.approx(0.8280, abs=5e-5)


def test_a_lone_branch_can_be_the_largest() -> None:
    # With r(y) = y/2 the whole net goes through four of them at least, one branch through two.
    assert resnet(18, 0.999)(1.0, lambda y: y / 2) == 0.25


def test_shortcuts_by_hand() -> None:
    # Slope of two kinds of blocks: (w² + (1−w²)s²) without projection, (w²s + (1−w²)s²) with.
    w2, s = 0.36, 1.1
    plain, projected = w2 + (1 - w2) * s**2, w2 * s + (1 - w2) * s**2
    expected = plain**5 * projected**3 * s
    assert resnet(18, 0.6)(1.0, lambda y: s * y) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("depth", [0, -1, -(10**9)])
def test_depth_is_positive(depth: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        chain(depth)


@pytest.mark.parametrize("depth", [True, False, 3.0, 2.5, "3", None, math.nan])
def test_depth_is_an_int(depth: object) -> None:
    with pytest.raises(TypeError, match="must be an int"):
        chain(depth)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [20, 0, True, "50", 50.5])
def test_resnets_are_the_official_ones(depth: int) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        resnet(depth)


@pytest.mark.parametrize("weight", [1.0, -0.1, math.nan, math.inf])
def test_shortcut_weight_is_checked(weight: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        resnet(50, weight)


MAPS: list[tuple[float, Callable[[float], float]]] = [
    (0.0, relu),
    (0.0, lambda c: leaky_c_map(0.4, c)),
    (1.0, lambda y: 1.3 * y),
    (0.0, lambda y: 0.1 + y),
    (1.0, lambda y: y),
]
Edge = tuple[int, int, int]  # from, to, which of to's inputs; from −1 and to the number of nodes


def coefficients(node: Node) -> list[float]:
    if node.op == "sum":
        return [w * w for w in node.weights]
    if node.op == "concat":
        return [n / sum(node.weights) for n in node.weights]
    return [1.0] * len(node.inputs)


def by_enumeration(net: Wiring, x: float, r: Callable[[float], float]) -> float:
    """M(x) by its definition: every part with one way in and one way out, one after the other."""
    n = len(net.nodes)
    edges: list[Edge] = [(-1, i, 0) for i, node in enumerate(net.nodes) if node.op == "input"]
    for i, node in enumerate(net.nodes):
        shares = coefficients(node)
        edges += [(j, i, k) for k, j in enumerate(node.inputs) if shares[k]]
    edges += [(i, n, i) for i in set(net.outputs)]

    def ways(at: int) -> list[tuple[Edge, ...]]:
        if at == n:
            return [()]
        return [(e, *rest) for e in edges if e[0] == at for rest in ways(e[1])]

    def value(at: int, entry: Edge | None) -> float:
        node = net.nodes[at]
        if node.op == "input":
            return x
        total = 0.0
        for k, (j, share) in enumerate(zip(node.inputs, coefficients(node), strict=True)):
            if share:
                total += share * (x if (j, at, k) == entry else value(j, entry))
        return r(total) if node.op == "nonlinear" else total

    every = ways(-1)
    found = [value(i, None) for i in net.outputs]
    for first, last in itertools.permutations({e for way in every for e in way}, 2):
        together = all((first in way) == (last in way) for way in every)
        ordered = any(
            way.index(first) < way.index(last) for way in every if {first, last} <= {*way}
        )
        if together and ordered and last[0] >= 0:
            found.append(value(last[0], first))
    return max(found)


@st.composite
def wirings(draw: st.DrawFn) -> Wiring:
    nodes = [Node("input")] * draw(st.integers(1, 2))
    for _ in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(["nonlinear", "nonlinear", "sum", "concat", "affine", "pool"]))
        # Near ones, mostly, so that the graph is deep.
        before = st.integers(max(0, len(nodes) - 4), len(nodes) - 1)
        if kind in ("sum", "concat"):
            inputs = tuple(draw(st.lists(before, min_size=1, max_size=3)))
            counts = [draw(st.integers(int(kind == "concat"), 5)) for _ in inputs]
            counts[0] = counts[0] or int(not any(counts))
            unit = math.sqrt(sum(k * k for k in counts)) if kind == "sum" else 1.0
            weights = tuple(k / unit for k in counts)
            nodes.append(Node(kind, inputs, weights))  # type: ignore[arg-type]
        else:
            nodes.append(Node(kind, (draw(before),)))  # type: ignore[arg-type]
    outputs = draw(st.sets(st.integers(0, len(nodes) - 1), max_size=2))
    return Wiring(tuple(nodes), tuple(outputs))


@hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
@hypothesis.given(wirings())
def test_every_subnetwork_counts(net: Wiring) -> None:
    for x, r in MAPS:
        assert net(x, r) == pytest.approx(by_enumeration(net, x, r), rel=1e-12, abs=1e-14)


def row(*ops: str, at: int = 0) -> list[Node]:
    """Nodes one after the other, the first after node `at`."""
    return [Node(op, (at + i,)) for i, op in enumerate(ops)]  # type: ignore[arg-type]


def v2(counts: tuple[int, ...], layers: int, weight: float, projected: bool) -> Wiring:
    """A ResNet of pre-activation blocks, node by node."""
    nodes = [Node("input"), Node("affine", (0,))]
    for group, count in enumerate(counts):
        for block in range(count):
            start = len(nodes) - 1
            nodes += row(*["nonlinear", "affine"] * layers, at=start)
            end = shortcut = len(nodes) - 1
            if block == 0 and (projected or group > 0):
                nodes.append(Node("affine", (start + 1,)))
                shortcut += 1
            else:
                shortcut = start
            weights = weight, math.sqrt(1 - weight**2)
            nodes.append(Node("sum", (shortcut, end), weights))
    return Wiring((*nodes, *row("nonlinear", "pool", "affine", at=len(nodes) - 1)))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 0.95])
@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152, 200])
def test_wired_resnets_are_the_official_recursions(depth: int, weight: float) -> None:
    blocks = {18: (2, 2, 2, 2), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
    deep = depth >= 50
    net = v2(blocks.get(depth, (3, 4, 6, 3)), 3 if deep else 2, weight, deep)
    for x, r in MAPS:
        assert net(x, r) == pytest.approx(resnet(depth, weight)(x, r), rel=1e-12)


def test_nested_forks() -> None:
    # Every inner sum is mostly its shortcut, every outer one too: the longest branch wins alone.
    inner = (Node("sum", (1, 3), (0.9, math.sqrt(0.19))),)
    nodes = [Node("input"), *row("affine", "nonlinear", "nonlinear"), *inner]
    nodes += [*row("nonlinear", at=4), Node("sum", (0, 5), (0.99, math.sqrt(1 - 0.99**2)))]
    net = Wiring(tuple(nodes))
    s = 2.0
    branch = (0.81 + 0.19 * s * s) * s
    assert net(1.0, lambda y: s * y) == pytest.approx(max(s * s, branch))
    assert net.depth == 3


def test_the_whole_alone() -> None:
    net = Wiring((Node("input"), *row("nonlinear"), Node("sum", (0, 1), (0.6, 0.8))))
    assert net.whole(1.0, lambda y: y / 2) == pytest.approx(0.36 + 0.64 / 2)
    assert net(1.0, lambda y: 2 * y) == 2 > net.whole(1.0, lambda y: 2 * y)


def test_dead_ends_do_not_count() -> None:
    nodes = (Node("input"), *row("nonlinear", "nonlinear"), Node("unknown", (1,)))
    net = Wiring(nodes, (1,))
    assert net.live == (0, 1)
    assert net(1.0, lambda y: 2 * y) == 2
    vanilla = Wiring((Node("input"), *row("nonlinear"), Node("sum", (0, 1), (0.0, 1.0))))
    assert vanilla(0.0, lambda y: y + 1) == chain(1)(0.0, lambda y: y + 1)
    # An infinite value that weighs nothing stays out.
    assert Wiring((*nodes[:2], Node("sum", (0, 1), (0.0, 1.0))))(math.inf, lambda y: 3.0) == 3


def test_two_ways_out() -> None:
    net = Wiring((Node("input"), *row("nonlinear", "nonlinear", "nonlinear")), (1, 3))
    assert net(0.0, lambda y: y + 1) == 3
    assert net.depth == 3


@pytest.mark.parametrize("depth", [1, 10_000])
def test_long_chains(depth: int) -> None:
    net = Wiring((Node("input"), *row(*["affine", "nonlinear"] * depth)))
    assert net.depth == depth
    assert net.label == f"depth={depth}"
    for x, r in MAPS[1:4]:
        assert net(x, r) == chain(depth)(x, r)


def test_ten_thousand_blocks() -> None:
    net = v2((10_000,), 1, 0.999, False)
    assert net.depth == 10_001
    assert net(0.0, lambda y: y + 1) == pytest.approx(1 + 10_000 * (1 - 0.999**2))


def test_solves_as_a_wiring() -> None:
    net = v2((3, 4, 6, 3), 3, 0.5, True)
    spec = solve("TAT", "leaky_relu", subnet_max=net)
    assert spec.negative_slope == pytest.approx(0.3573, abs=5e-5)
    assert "wiring of depth 49" in spec.origin
    assert solve("DKS", "tanh", subnet_max=pickle.loads(pickle.dumps(net))) == solve(
        "DKS", "tanh", subnet_max=net
    )


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (Node("unknown", (1,), path="encoder.2", note="do this"), "'encoder.2' cannot be .* this"),
        (Node("unknown", (1,)), "nothing is known"),
        (Node("sum", (0, 1), (1.0, 1.0), "block:add"), r"'block:add' .*\(1, 1\), .* 2, .*Normal"),
        (Node("sum", (0, 1), (0.7, 0.7)), "reweight_shortcuts"),
        (Node("sum", (1,), (0.9,), "scale"), "'scale' multiplies by 0.9"),
        (Node("concat", (0, 1), path="join"), "'join' .* example"),
    ],
)
def test_names_what_cannot_be_evaluated(node: Node, message: str) -> None:
    net = Wiring((Node("input"), *row("nonlinear"), node))
    with pytest.raises(UnreadableError, match=message):
        net(0.0, relu)
    with pytest.raises(UnreadableError, match="1 more like this"):
        Wiring((*net.nodes, Node("unknown", (2,))))(0.0, relu)
    assert net.depth == 1


def test_normalized() -> None:
    net = Wiring((Node("input"), *row("nonlinear"), Node("sum", (0, 1), (3.0, -4.0))))
    assert net.normalized()(0.0, lambda y: y + 1) == pytest.approx(1.0)
    whole = Wiring((*net.nodes, Node("affine", (2,)))).normalized()
    assert whole.nodes[2].weights == pytest.approx((0.6, -0.8))
    assert Wiring((Node("input"), Node("sum", (0,), (0.0,)))).normalized().problems


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((), "at least one node"),
        ((Node("input"), Node("affine", (1,))), "cycle"),
        ((Node("input"), Node("nonlinear", (2,)), Node("affine", (1,))), "cycle"),
        ((Node("input"), Node("nonlinear", (-1,))), "come before"),
        ((Node("input"), Node("nonlinear")), "needs 1"),
        ((Node("input"), Node("input", (0,))), "needs 0"),
        ((Node("input"), Node("sum")), "takes 0 inputs"),
        ((Node("input"), Node("sum", (0, 0), (1.0,))), "1 weights for 2 inputs"),
        ((Node("input"), Node("sum", (0,), (math.nan,))), "finite"),
        ((Node("input"), Node("concat", (0, 0), (0.0, 3.0))), "positive"),
        ((Node("input"), Node("relu", (0,))), "unknown op; known: input"),  # type: ignore[arg-type]
    ],
)
def test_refuses_graphs(nodes: tuple[Node, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wiring(nodes)


def test_refuses_outputs() -> None:
    with pytest.raises(ValueError, match="no node 3"):
        Wiring((Node("input"),), (3,))


def test_without_nonlinear_layers() -> None:
    net = Wiring((Node("input"), Node("affine", (0,))))
    assert net(0.3, relu) == 0.3
    with pytest.raises(ValueError, match="a wiring without nonlinear layers does not grow with r"):
        solve("TAT", "leaky_relu", subnet_max=net)


def test_names_activations_of_unmixed_sums() -> None:
    layer = Node("affine", (0,)), Node("nonlinear", (1,), path="stem")
    branch = (
        Node("affine", (2,)),
        Node("sum", (2, 3), (0.6, 0.8)),
        Node("nonlinear", (4,), path="v1"),
    )
    v1 = Wiring((Node("input"), *layer, *branch))
    assert v1.unmixed == ("v1",)
    pooled = Node("affine", (2,)), Node("pool", (3,)), Node("nonlinear", (4,), path="after a pool")
    assert Wiring((Node("input"), *layer, *pooled)).unmixed == ()
    assert Wiring((Node("input"), *layer, Node("nonlinear", (2,), path="b"))).unmixed == ("b",)


def test_nan_is_not_hidden() -> None:
    net = Wiring((Node("input"), *row("nonlinear"), Node("sum", (0, 1), (0.6, 0.8))))
    assert math.isnan(net(0.0, lambda y: math.nan))


def test_wirings_compare_and_print() -> None:
    spec = ActSpec("tanh")
    nodes = (Node("input"), Node("nonlinear", (0,), spec=spec))
    assert Wiring(nodes) == Wiring(nodes, (1,), ("a note",))
    assert hash(Wiring(nodes)) == hash(Wiring(nodes))
