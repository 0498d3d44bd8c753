"""fold: rewrites a converted model in stock torch modules, with constants in the weights."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fusedshape.faithful import differs, inputs_for, leaving_no_trace
from fusedshape.kinds import Kind, features, kind_of, zeros_around
from fusedshape.nn import NormalizedSum, PerLocationNorm, ShapedActivation, ShapedChain
from fusedshape.nodes import is_foreign, is_number, is_query, operation
from fusedshape.proxies import UntraceableError
from fusedshape.spec import ActSpec, is_half
from fusedshape.torch_ops import (
    CONCATS,
    DROPOUTS,
    MEANS,
    MOVES,
    PADS,
    PARTS,
    RESIZES,
    VIEWS,
    base,
    function_of,
    writes,
)
from fusedshape.tracing import (
    Attribute,
    Slot,
    is_plain,
    memory_roots,
    read_call,
    required,
    take_over,
    tensor_args,
    trace,
    ways_of,
    write_out_of_place,
)
from fusedshape.validate import flag

_PAD_ARGUMENTS = ("input", "pad", "mode", "value")  # of torch.nn.functional.pad
_PADS: tuple[Any, ...] = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)

# Operations that commute with y ↦ s·y + t, because they move numbers or take means of them. Not
# among them: parts (several tensors), unfold (pads with zeros), casts (round the value at that
# point), and average pools, whose weights need not add up to 1.
_MOVED = (VIEWS - PARTS - {"unfold"}) | MOVES | RESIZES | (MEANS - {"avg_pool"})
_MOVED |= {"contiguous", "detach"}
# How many float64 roundings a folded model may differ by: δ and φ nearly cancel in every layer.
_ROUNDINGS = 1e8


def fold(model: nn.Module, *, keep_delta: bool = False, example: Any = None) -> fx.GraphModule:
    r"""Make a new model of stock torch modules that computes the same, up to rounding.

    Use it for deployment: the result does not need fusedshape, pickles, compiles, and exports
    through torch.export and torch.onnx. α and β go into the layer before the activation, γ and δ
    into the layers after it (or into the layer before, if γφ(z) = φ(γz)), and weights of normalised
    sums into the last layers of their branches. Pools, reshapes, dropout and sums may lie in
    between. Constants that no layer can take become multiplications and additions.

    A shift δ before a zero-padded convolution is exact too: an nn.ConstantPad pads its input with
    −δ instead of zeros, because γ(−δ + δ) = 0.

    The result holds copies, keeps devices, dtypes, modes and most state_dict keys, and computes
    what the model computes in evaluation mode; dropout modules are kept and work in training.
    Activations for which torch has no module, and `PerLocationNorm`, become torch's functions.

    A forward that asks for shapes, types or optional arguments is read as it runs on `example`, if
    you pass one. The result then holds for inputs that take the same decisions: where a forward
    computes with its input's shape, pass the shapes, batch size included, that you will use.

    Fold for float32. In half precision φ is rounded before δ cancels most of it, and γ multiplies
    the error; the fused layers avoid this. With 49 TAT layers of tanh (γ = 15.8) in bfloat16 the
    error is 0.5 of the output's root mean square folded, and 0.016 fused. For leaky_relu, which has
    no δ, both are 0.01.

    Args:
        model: a model that `fusedshape.convert` changed, or one built of `fusedshape.nn`. Optional
            arguments of its forward keep their defaults, but for those that `example` has.
        keep_delta: add δ explicitly before zero-padded convolutions, which then keep their padding.
        example: an input of the model, or a tuple of inputs; by default small random ones that fit
            its first layers, if any do. On it, a folded float64 copy of the model is compared with
            the copy itself; a UserWarning says so if that could not be done.

    Returns:
        A torch.fx.GraphModule.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: a forward cannot be traced, there are hooks, which would be lost, an activation
            cannot be written in torch's functions, or the folded model does not compute the same.

    Example:
        >>> from fusedshape.nn import ShapedLinear
        >>> spec = ActSpec("leaky_relu", output_scale=2.0, negative_slope=0.3)
        >>> folded = fold(nn.Sequential(ShapedLinear(4, 4, spec=spec), nn.Linear(4, 2)))
        >>> [type(m).__name__ for m in folded.children()]
        ['Linear', 'LeakyReLU', 'Linear']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold: model must be an nn.Module, got {type(model).__name__}")
    flag("fold", "keep_delta", keep_delta)
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"fold: {_name(path, module)} has forward hooks, which would be lost; remove them"
            )
    if is_plain(model) and not isinstance(model, ShapedChain):
        model = nn.Sequential(model).train(model.training)
    args = inputs_for(model, example)
    given = args if example is not None else None
    _compare(model, keep_delta, args, given is not None)
    grad = torch.is_grad_enabled()

    def folded() -> fx.GraphModule:
        with torch.set_grad_enabled(grad):
            return _folded(model, keep_delta, given)

    # Reading a parametrised weight may write to its buffers, as spectral_norm does.
    return leaving_no_trace(model, folded)


def _folded(model: nn.Module, keep_delta: bool, args: tuple[Any, ...] | None) -> fx.GraphModule:
    flat = _Flattening(model, args)
    flat.write()
    _out_of_place(flat.graph, model)
    return _Folding(model, flat.graph, flat.constants, keep_delta).result()


def _compare(model: nn.Module, keep_delta: bool, args: tuple[Any, ...] | None, given: bool) -> None:
    """Raise if folding a float64 copy changes what it computes; warn if that cannot be known."""
    if args is None:
        _not_compared("no input was found", "pass example=")
        return
    twin = copy.deepcopy(model).double().eval()
    args = pytree.tree_map_only(_is_float, Tensor.double, args)
    try:
        wanted = leaving_no_trace(twin, lambda: twin(*pytree.tree_map(_copied, args)))
    except Exception as error:
        why = f"in float64 it raises {type(error).__name__}: {error}"
        _not_compared(why, "compare them yourself in the dtype that it takes")
        return
    folded = leaving_no_trace(twin, lambda: _folded(twin, keep_delta, args if given else None))
    with torch.no_grad():
        difference = differs(folded(*pytree.tree_map(_copied, args)), wanted, _ROUNDINGS)
    if difference:
        raise ValueError(
            f"fold: {type(model).__name__} cannot be followed: folded, it gives {difference}. It "
            "takes a decision that a trace does not see, for instance by the type of a value in a "
            "helper; make that a decision of the constructor"
        )


def _not_compared(why: str, way_out: str) -> None:
    message = f"fold: the folded model was not compared with the model: {why}; {way_out}"
    warnings.warn(message, stacklevel=4)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _name(path: str, module: nn.Module) -> str:
    return f"{path!r} ({type(module).__name__})" if path else type(module).__name__


class _Flattening:
    """Writes what a model computes in evaluation into one graph of torch's and our modules.

    A forward that asks for shapes, types or optional arguments is read as it runs on the example,
    if one is given; what is read holds for inputs that take the same decisions.

    Attributes:
        graph: the graph.
        constants: the tensors of get_attr nodes that are no tensors of the model.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...] | None) -> None:
        self.model = model
        self.args = args
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.paths = {module: path for path, module in model.named_modules()}
        tensors = (*model.named_parameters(), *model.named_buffers())
        self.tensors = {tensor: path for path, tensor in tensors}
        self.values: dict[fx.Node, Any] = {}  # on the example, as far as they were needed

    def write(self) -> None:
        """Write the graph."""
        inputs = [self.graph.placeholder(name) for name in _arguments(self.model, self.args)]
        if self.args is not None:
            self.values |= zip(inputs, pytree.tree_map(_copied, self.args), strict=False)
        self.graph.output(self._inline(self.model, "", inputs, {}))

    def _inline(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        """Add what a call of a module computes; its value in the graph."""
        if isinstance(module, ShapedChain):
            (value,) = args
            for name, child in module.named_children():
                value = self._inline(child, f"{path}.{name}" if path else name, (value,), {})
            return value
        if is_plain(module) and not isinstance(module, PerLocationNorm):
            return _leaf(self.graph, module, path, args, kwargs)
        nodes: list[fx.Node] = []
        fx.map_arg((args, kwargs), nodes.append)
        # A number that is not known yet is no Slot; then the graph must hold for any call.
        known = not any(map(is_number, nodes))
        call = (_slots(tuple(args)), _slots(kwargs)) if known else None
        try:
            graph = trace(module, call)[-1]
        except UntraceableError as error:
            return self._by_example(module, path, args, kwargs, error)
        inputs = {n.target: n for n in graph.nodes if n.op == "placeholder"}
        given = nodes if known else [*args, *(kwargs[name] for name in list(inputs)[len(args) :])]
        prefix = f"{path}." if path else ""
        return self._copy(
            graph,
            given,
            lambda node: self.graph.get_attr(prefix + str(node.target)),
            lambda node: prefix + str(node.target),
        )

    def _by_example(
        self, module: nn.Module, path: str, args: Any, kwargs: Any, error: UntraceableError
    ) -> Any:
        """Add what a call of a module computes on the example."""
        where = f"fold: {_name(path, module)} cannot be traced: {error}. "
        if self.args is None:
            raise ValueError(
                f"{where}Pass example=, on which it can be read; or write that forward without, or "
                "fold the modules inside one by one"
            ) from None
        with _evaluating(self.model), torch.no_grad():
            self._run()
            call = fx.map_arg((args, kwargs), self.values.__getitem__)
            given, named = pytree.tree_map(_copied, call)
            try:
                reading = read_call(module, given, named, training=False)
            except UntraceableError as other:
                raise ValueError(
                    f"{where}Read as it runs on the example: {other}. Write that forward without, "
                    "or fold the modules inside one by one"
                ) from None
        nodes: list[fx.Node] = []
        fx.map_arg((args, kwargs), nodes.append)
        inputs = [part for node in nodes for part in self._parts(node)]

        def constant(node: fx.Node) -> fx.Node:
            value = reading.constants[str(node.target)]
            if not isinstance(value, Tensor):
                raise ValueError(f"{where}It passes on an object of {type(value).__name__}")
            if value not in self.tensors:
                name = f"constant_{len(self.constants)}"
                self.constants[name], self.tensors[value] = value, name
            return self.graph.get_attr(self.tensors[value])

        return self._copy(
            reading.graph, inputs, constant, lambda node: self.paths[reading.modules[node]]
        )

    def _copy(
        self,
        graph: fx.Graph,
        given: Sequence[Any],
        attribute: Callable[[fx.Node], fx.Node],
        path_of: Callable[[fx.Node], str],
    ) -> Any:
        """Copy a graph of one module, with its children's in the place of their calls."""
        left = iter(given)
        values: dict[fx.Node, Any] = {}

        def of(argument: Any) -> Any:
            return fx.map_arg(argument, lambda node: values[node])

        for node in graph.nodes:
            args, kwargs = of(node.args), of(node.kwargs)
            if node.op == "placeholder":
                values[node] = next(left)
            elif node.op == "get_attr":
                values[node] = attribute(node)
            elif node.op == "call_module":
                path = path_of(node)
                values[node] = self._inline(self.model.get_submodule(path), path, args, kwargs)
            elif node.op == "output":
                return args[0]
            else:
                values[node] = self.graph.create_node(node.op, node.target, args, kwargs)
        raise AssertionError("a graph ends with its output")

    def _parts(self, node: fx.Node) -> Iterator[fx.Node]:
        """Nodes of the tensors in a node's value, in the order in which a reading takes them."""
        for way in ways_of(self.values[node]):
            part = node
            for key in way:
                get: Any = getattr if isinstance(key, Attribute) else operator.getitem
                part = self.graph.call_function(get, (part, key))
            yield part

    def _run(self) -> None:
        """Compute the values of all nodes so far."""
        for node in self.graph.nodes:
            if node in self.values:
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
            if node.op == "get_attr":
                found = self.constants.get(str(node.target))
                self.values[node] = _attribute_of(self.model, node) if found is None else found
            elif node.op == "call_module":
                self.values[node] = self.model.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                self.values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif node.target is _activate:  # the value of a shaped layer is activated already
                act = node.meta["module"]
                self.values[node] = args[0] if act is None else act(*args)
            else:
                self.values[node] = cast("Any", node.target)(*args, **kwargs)


def _attribute_of(model: nn.Module, node: fx.Node) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _arguments(model: nn.Module, args: tuple[Any, ...] | None) -> list[str]:
    """The names of the arguments that a folded model takes: the required ones, and those given."""
    needed = required(model)
    if args is None or len(args) <= len(needed):
        return needed
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return [*needed, *(name for name in names if name not in needed)][: len(args)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and its modules back into theirs."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _slots(tree: Any) -> Any:
    """Replace nodes among arguments by slots, in plain tuples, lists and dicts."""
    if isinstance(tree, (tuple, list)):
        return (tuple if isinstance(tree, tuple) else list)(map(_slots, tree))
    if isinstance(tree, dict):
        return {key: _slots(value) for key, value in tree.items()}
    return Slot() if isinstance(tree, fx.Node) else tree


def _leaf(flat: fx.Graph, module: nn.Module, path: str, args: Any, kwargs: Any) -> fx.Node:
    spec = getattr(module, "spec", None)
    if isinstance(spec, ActSpec):
        value = args[0] if args else kwargs["x"]
        if not isinstance(module, ShapedActivation):
            value = flat.call_module(path, (value,))
            path += "_act"
        node = flat.call_function(_activate, (value,))
        act = module if isinstance(module, ShapedActivation) else None
        node.meta = {"spec": spec, "path": path, "module": act}
        return node
    foreign = type(module) not in (NormalizedSum, nn.Identity)
    for name, inner in module.named_modules():
        if foreign and type(inner).__module__.startswith("fusedshape"):
            raise ValueError(
                f"fold: {_name(path, module)} calls {_name(name, inner)} in torch's own forward, "
                "which folding does not reach; write that module out"
            )
    return flat.call_module(path, args, kwargs)


def _activate(value: Any) -> Any:
    """Mark an activation in a graph that is never run; its spec is in the node's meta."""


def _out_of_place(graph: fx.Graph, model: nn.Module) -> None:
    """Rewrite in-place operations to return new tensors, which later users take."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        in_place = writes(operation(node))
        flagged = bool(node.kwargs.get("inplace")) or bool(getattr(module, "inplace", False))
        if not in_place and not flagged:
            continue
        changed = tensor_args(node)[0]
        roots = memory_roots(graph, model, fresh=(node,))
        for other, root in roots.items():
            later = [u for u in other.users if order[u] > order[node] and not is_query(u)]
            if root is roots[changed] and other not in (node, changed) and later:
                raise ValueError(
                    f"fold: {node.name} changes a tensor in place that {later[0].name} sees "
                    "through a view of it; write it out of place"
                )
        take_over(changed, node, order)
        write_out_of_place(node)


@dataclass(frozen=True)
class _Value:
    """A tensor of the old model, expressed in the new one as scale · node + shift."""

    node: fx.Node
    scale: float = 1.0
    shift: float = 0.0


def _operation(node: fx.Node) -> str:
    """The name of the torch operation at a node; "" for a user's function."""
    return "" if is_foreign(node) else operation(node)


def _gives_indices(node: fx.Node, module: Any, name: str) -> bool:
    """Whether a max pool also returns where the maxima are."""
    if module is not None:
        return bool(module.return_indices)
    place = 2 if name.startswith("adaptive") else 6  # of return_indices
    return bool(node.kwargs.get("return_indices")) or len(node.args) > place


def _averages_evenly(node: fx.Node, module: Any) -> bool:
    """Whether the weights of every window of an average pool add up to 1."""
    if module is None:
        return len(node.args) <= 3 and not node.kwargs
    pads = module.padding if isinstance(module.padding, tuple) else (module.padding,)
    evenly = not module.count_include_pad or not any(pads)
    return evenly and getattr(module, "divisor_override", None) is None


def _padded(node: fx.Node, module: Any) -> str:
    """What of s·y + t padding lets through; see `_Folding._passes`."""
    if module is not None:
        mode, value = "constant", getattr(module, "value", None)
    else:
        given: dict[str, Any] = dict(zip(_PAD_ARGUMENTS, node.args, strict=False))
        given |= node.kwargs
        mode, value = given.get("mode", "constant"), given.get("value")
    if mode != "constant":
        return "all"
    return "scale" if value in (None, 0) else ""


class _Layer:
    """A layer that absorbs constants: its weight is multiplied by `gain`, its bias replaced."""

    def __init__(self, module: Any, kind: Kind) -> None:
        self.module = module
        self.kind = kind
        self.gain = 1.0
        self.bias: Tensor | None = None
        if module.bias is not None:
            self.bias = module.bias.detach().to("cpu", torch.float64, copy=True)
        self.padded = False  # whether an nn.ConstantPad does the padding

    def after(self, scale: float, shift: float) -> None:
        """Absorb a scale and shift of the input: the layer gets v instead of scale · v + shift."""
        if shift:
            weight = self.module.weight.detach()
            sums = weight.cpu().sum(tuple(range(1, weight.ndim)), dtype=torch.float64)
            self._add(self.gain * shift * sums)
        self.gain *= scale

    def before(self, scale: float, shift: float) -> None:
        """Absorb a scale and shift of the output: the layer will return scale · z + shift."""
        self.gain *= scale
        if self.bias is not None:
            self.bias = scale * self.bias
        if shift:
            _, outputs = features(self.module)
            self._add(torch.full((outputs,), shift, dtype=torch.float64))

    def _add(self, bias: Tensor) -> None:
        self.bias = bias if self.bias is None else self.bias + bias

    def same_as(self, other: _Layer) -> bool:
        """Whether two calls of one module have absorbed the same constants."""
        if (self.gain, self.padded) != (other.gain, other.padded):
            return False
        if self.bias is None or other.bias is None:
            return self.bias is other.bias
        return torch.equal(self.bias, other.bias)

    def build(self) -> nn.Module:
        """Make the plain layer."""
        old = self.module
        changes = {"padding": 0} if self.padded else {}
        new = self.kind.blank(old, bias=self.bias is not None, **changes)
        weight = old.weight.detach()
        new.weight = nn.Parameter(weight * self.gain, old.weight.requires_grad)
        if self.bias is not None:
            self.bias = self.bias.to(weight.device, weight.dtype)
            new.bias = nn.Parameter(self.bias, old.weight.requires_grad)
        return new.train(old.training)


class _Folding:
    """Writes the new graph, node by node."""

    def __init__(
        self, model: nn.Module, flat: fx.Graph, constants: Mapping[str, Tensor], keep_delta: bool
    ) -> None:
        self.model = model
        self.flat = flat
        self.constants = constants
        self.keep_delta = keep_delta
        self.half = any(is_half(p.dtype) for p in model.parameters())
        self.graph = fx.Graph()
        self.values: dict[fx.Node, _Value] = {}
        self.plain: dict[fx.Node, fx.Node] = {}  # results of _plain
        self.layers: dict[fx.Node, _Layer] = {}  # by its call in the old graph
        self.calls: dict[fx.Node, _Layer] = {}  # by its call in the new graph
        self.parts: dict[str, Any] = {}
        self.taken = {name for name, _ in model.named_modules()}
        self.copies: dict[int, Any] = {}
        self.attributes: dict[str, str] = {}  # new names by old names

    def result(self) -> fx.GraphModule:
        """Build the new model."""
        for node in self.flat.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._plain))
            else:
                self.values[node] = self._fold(node)
        built: dict[nn.Module, list[tuple[_Layer, str]]] = {}
        for node, layer in self.calls.items():
            known = built.setdefault(layer.module, [])
            path = next((path for other, path in known if layer.same_as(other)), None)
            if path is None:
                path = self._new(node.target) if known else str(node.target)
                self.parts[path] = layer.build()
                known.append((layer, path))
            node.target = path
        folded = fx.GraphModule(
            self.parts, self.graph, class_name=f"Folded{type(self.model).__name__}"
        )
        for module in folded.modules():
            if module is folded or type(module) is nn.Module:
                module.training = self.model.training
        return folded

    def _new(self, name: Any) -> str:
        """An unused name: the one given, with a number appended if need be."""
        names = (f"{name}_{i}" if i else str(name) for i in range(10**6))
        found = next(name for name in names if name not in self.taken and name not in self.parts)
        self.taken.add(found)
        return found

    def _called(self, node: fx.Node) -> Any:
        """The module that a node of the old graph calls, or None."""
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _fold(self, node: fx.Node) -> _Value:
        module = self._called(node)
        if isinstance(module, nn.Identity):
            return self.values[tensor_args(node)[0]]
        kind = kind_of(module)
        if kind is not None and len(tensor_args(node)) == 1:
            return self._layer(node, _Layer(module, kind))
        if isinstance(module, NormalizedSum):
            return self._sum(node, list(node.args), module.weights)
        if node.target is _activate:
            return self._activation(node)
        if self._is_sum(node):
            return self._sum(node, list(node.args), (1.0, 1.0))
        if _operation(node) in CONCATS:
            return self._cat(node)
        return self._move(node, self._passes(node))

    def _passes(self, node: fx.Node) -> str:
        """Which s·y + t commute with an operation: "all", "positive" s, "scale" (t = 0) or ""."""
        module = self._called(node)
        name = base(function_of(module) if module is not None else _operation(node))
        if not tensor_args(node):
            return ""
        if name in ("max_pool", "adaptive_max_pool"):
            return "" if _gives_indices(node, module, name) else "positive"
        if name == "avg_pool":
            return "all" if _averages_evenly(node, module) else "scale"
        if name in DROPOUTS:
            return "scale"
        if name in PADS:
            return _padded(node, module)
        return "all" if name in _MOVED and "dtype" not in node.kwargs else ""

    def _behind(self, user: fx.Node, scale: float, shift: float, which: int = 0) -> _Layer | None:
        """The layer that can apply scale · z + shift to an argument that only `user` takes."""
        node = tensor_args(user)[which]
        while tensor_args(user).count(node) == 1:
            if any(other is not user and not is_query(other) for other in node.users):
                return None
            if node in self.layers:
                return self.layers[node]
            passes = "all" if isinstance(self._called(node), nn.Identity) else self._passes(node)
            if not passes or (passes == "positive" and scale < 0) or (passes == "scale" and shift):
                return None
            user, node = node, tensor_args(node)[0]
        return None

    def _layer(self, node: fx.Node, layer: _Layer) -> _Value:
        value = self.values[tensor_args(node)[0]]
        if value.shift and layer.kind.transposed:
            # At the edges fewer taps read the shift.
            value = self._unshifted(value)
        elif value.shift and (pads := zeros_around(layer.module)):
            if self.keep_delta:
                value = self._unshifted(value)
            else:
                pad = _PADS[layer.kind.dimensions - 1](pads, -value.shift / value.scale)
                value = replace(value, node=self._call(f"{node.target}_pad", pad, value.node))
                layer.padded = True
        layer.after(value.scale, value.shift)
        new = self.graph.call_module(str(node.target), (value.node,))
        self.layers[node] = self.calls[new] = layer
        return _Value(new)

    def _activation(self, node: fx.Node) -> _Value:
        spec: ActSpec = node.meta["spec"]
        value = self.values[tensor_args(node)[0]]
        # φ's argument in terms of the value's node
        a = spec.input_scale * value.scale
        b = spec.input_scale * value.shift + spec.input_shift
        gain = spec.output_scale if spec.row.homogeneous and spec.output_scale > 0 else 1.0
        layer = self._behind(node, gain * a, gain * b)
        if layer is not None:
            layer.before(gain * a, gain * b)
            u, scale = value.node, spec.output_scale / gain
        elif spec.row.homogeneous and a > 0 and b == 0:
            u, scale = value.node, spec.output_scale * a
        else:
            u, scale = self._affine(value.node, a, b), spec.output_scale
        phi = self._phi(spec, node.meta["path"], u)
        return _Value(phi, scale, spec.output_scale * spec.output_shift)

    def _phi(self, spec: ActSpec, path: str, u: fx.Node) -> fx.Node:
        row = spec.row
        if row.module is not None:
            if path not in self.parts:
                self.parts[path] = row.module(spec.negative_slope)
            return self.graph.call_module(path, (u,))
        if row.function is None:
            raise ValueError(
                f"fold: {row.name} has neither a module nor a function of torch's; give it one in "
                "its row of fusedshape.activations.ACTIVATIONS"
            )
        argument: Any = fx.Proxy(u, fx.proxy.GraphAppendingTracer(self.graph))
        made: Any = row.function(argument, spec.negative_slope)
        return made.node

    def _is_sum(self, node: fx.Node) -> bool:
        if _operation(node) != "add" or len(node.args) != 2 or node.kwargs:
            return False
        both = [a for a in node.args if isinstance(a, fx.Node) and not is_number(a)]
        return len(both) == 2 and any(self.values[a] != _Value(self.values[a].node) for a in both)

    def _sum(self, node: fx.Node, args: list[Any], weights: tuple[float, ...]) -> _Value:
        """Σ w·y: a branch's factor goes into its last layer if there is one, else into the sum."""
        terms = []
        shift = 0.0
        for i, (arg, w) in enumerate(zip(args, weights, strict=True)):
            value = self.values[arg]
            if w != 0:
                terms.append((i, value.node, w * value.scale))
                shift += w * value.shift
        factor = terms[0][2]
        if any(c != factor for _, _, c in terms):
            factor = 1.0
            for j, (i, u, c) in enumerate(terms):
                layer = self._behind(node, c, 0.0, i) if c != 1 else None
                if layer is not None:
                    layer.before(c, 0.0)
                    terms[j] = (i, u, 1.0)
            # torch.add can scale every term but the first
            terms.sort(key=lambda term: term[2] != 1)
            _, total, c = terms[0]
            total = self._affine(total, c, 0.0)
        else:
            terms = [(i, u, 1.0) for i, u, _ in terms]
            total = terms[0][1]
        for _, u, c in terms[1:]:
            if c != 1 and self.half:  # torch's CPU kernel would round alpha
                u, c = self._affine(u, c, 0.0), 1.0
            total = self.graph.call_function(torch.add, (total, u), {"alpha": c} if c != 1 else {})
        return _Value(total, factor, shift)

    def _cat(self, node: fx.Node) -> _Value:
        values = [self.values[a] for a in tensor_args(node)]
        alike = all((v.scale, v.shift) == (values[0].scale, values[0].shift) for v in values)
        if not alike:
            return _Value(self._copy(node, self._plain))
        return replace(values[0], node=self._copy(node, lambda n: self.values[n].node))

    def _move(self, node: fx.Node, passes: str) -> _Value:
        """Copy an operation, with the part of s·y + t that commutes moved behind it."""
        if is_query(node):
            return _Value(self._copy(node, lambda n: self.values[n].node))
        value = self.values[tensor_args(node)[0]] if passes else None
        if value is None or (passes == "positive" and value.scale < 0):
            return _Value(self._copy(node, self._plain))
        if passes == "scale":
            value = self._unshifted(value)
        first, kept = tensor_args(node)[0], value.node
        new = self._copy(node, lambda n: kept if n is first else self._plain(n))
        return replace(value, node=new)

    def _copy(self, node: fx.Node, argument: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Copy an operation to the new graph."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
        target = str(node.target)
        if node.op == "call_module" and target not in self.parts:
            part = copy.deepcopy(self._called(node), self.copies)
            for module in part.modules():
                if hasattr(module, "inplace"):
                    module.inplace = False
            self.parts[target] = part
        elif node.op == "get_attr":
            target = self._attribute(target)
        return self.graph.create_node(
            node.op, target if node.op == "get_attr" else node.target, args, kwargs, node.name
        )

    def _attribute(self, target: str) -> str:
        """The new model's name of a tensor; a layer's own is copied, as folding changes it."""
        if target in self.constants and target not in self.attributes:
            self.attributes[target] = self._new(target)
            self.parts[self.attributes[target]] = self.constants[target].detach().clone()
        if target not in self.attributes:
            owner, _, name = target.rpartition(".")
            module = self.model.get_submodule(owner)
            own = kind_of(module) is not None
            path = self._new(target.replace(".", "_")) if own else target
            self.parts[path] = copy.deepcopy(getattr(module, name), self.copies)
            self.attributes[target] = path
        return self.attributes[target]

    def _call(self, path: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        path = self._new(path)
        self.parts[path] = module
        return self.graph.call_module(path, args)

    def _plain(self, node: fx.Node) -> fx.Node:
        """The node of the tensor itself, with its scale and shift applied."""
        if node not in self.plain:
            value = self._unshifted(self.values[node])
            self.plain[node] = self._affine(value.node, value.scale, 0.0)
        return self.plain[node]

    def _unshifted(self, value: _Value) -> _Value:
        # Add before scaling: φ and δ nearly cancel, and their difference is exact.
        shifted = self._affine(value.node, 1.0, value.shift / value.scale)
        return _Value(shifted, value.scale)

    def _affine(self, node: fx.Node, scale: float, shift: float) -> fx.Node:
        # torch's CPU kernel would first round the added number to the tensor's dtype.
        given, in_float = node, bool(self.half and shift)
        if in_float:
            node = self.graph.call_method("float", (node,))
        if scale != 1:
            node = self.graph.call_function(torch.mul, (node, scale))
        if shift:
            node = self.graph.call_function(torch.add, (node, shift))
        return self.graph.call_method("type_as", (node, given)) if in_float else node
