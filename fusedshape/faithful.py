"""Compares what was traced with the model itself, on an input if one can be made."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fusedshape.guard import Guard, save_place
from fusedshape.kinds import features, kind_of
from fusedshape.nodes import operation
from fusedshape.proxies import UntraceableError
from fusedshape.torch_ops import SUMS
from fusedshape.tracing import Reading, Slot, leaves_of, read_call, required
from fusedshape.undo import UndoLog, generator_of

_Result = TypeVar("_Result")
_SIZES = (8, 16, 32, 64, 224)  # of images, the smallest first
_SAMPLES = 2
# Two runs of the same operations differ by rounding only, where their order may vary.
_ROUNDINGS = 16


def leaving_no_trace(model: nn.Module, run: Callable[[], _Result]) -> _Result:
    """Run part of a model without gradients or hooks, and undo its side effects.

    Parameters, buffers, attributes, modes, hooks and random states are restored. What is written to
    parameters without PyTorch, for instance through NumPy, is not.
    """
    log = UndoLog()
    guard = Guard(log)
    state = random.getstate()
    try:
        for device in {torch.device("cpu"), *(t.device for _, t in _tensors_of(model))}:
            log.generator(generator_of(device))
        for name, parameter in model.named_parameters():
            guard.watch(parameter, name)
            save_place(parameter, name, log)
        for (
            name,
            buffer,
        ) in model.named_buffers():  # batch_norm writes undeclared
            log.tensor(buffer, name)
        log.save("the state of Python's random", lambda: random.setstate(state))
        for name, module in model.named_modules():
            log.module(module, name)
            for own, hooks in vars(module).items():
                if own.endswith("_hooks") and isinstance(hooks, dict):
                    hooks.clear()
        with torch.no_grad(), guard:
            return run()
    finally:
        try:
            log.undo()
        finally:
            log.undo()


def inputs_for(model: nn.Module, example: Any = None) -> tuple[Any, ...] | None:
    """Arguments with which a model runs: the example, or small random inputs that fit its layers.

    Args:
        model: the model; it is left unchanged.
        example: an input, or a tuple of inputs.

    Returns:
        The arguments; None if none were found. Random inputs come from a generator of their own.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return None
    if example is not None:
        return example if isinstance(example, tuple) else (example,)
    number = len(required(model))
    for found in _candidates(model):
        given = (found,) * number
        if runs(model, given):
            return given
    return None


def runs(model: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a model runs with some arguments in evaluation mode; it is left unchanged."""
    try:
        leaving_no_trace(model, lambda: model.eval()(*pytree.tree_map(_copy, args)))
    except Exception:
        return False
    return True


def _candidates(model: nn.Module) -> Iterator[Tensor]:
    """Inputs that may fit a model, judging by what its first layers take."""
    generator = torch.Generator().manual_seed(0)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def normal(*shape: int) -> Tensor:
        made = torch.randn(_SAMPLES, *shape, generator=generator, dtype=torch.float64)
        return made.to(like.device, like.dtype)

    layers = [m for m in model.modules() if kind_of(m) is not None or isinstance(m, nn.Embedding)]
    for layer in layers[:2]:
        if isinstance(layer, nn.Embedding):
            yield torch.arange(2 * _SAMPLES, device=like.device).view(_SAMPLES, 2) % (
                layer.num_embeddings
            )
            continue
        kind = kind_of(layer)
        assert kind is not None
        channels = features(layer)[0]
        if kind.dimensions:
            yield from (normal(channels, *[size] * kind.dimensions) for size in _SIZES)
        else:
            yield normal(channels)
            yield normal(4, channels)
    if not layers:
        yield normal(8)
        yield normal(8, 8, 8)


def unfaithful(
    model: nn.Module,
    graphs: Mapping[nn.Module, Sequence[fx.Graph]],
    args: tuple[Any, ...],
) -> tuple[nn.Module, str] | None:
    """The first module whose graphs compute something else than the module, in one run of a model.

    Args:
        model: the model; it is left unchanged.
        graphs: for each module its graphs of training and of evaluation, or one for both.
        args: arguments of the model.

    Returns:
        The module and how its graph differs; None if none does.
    """
    for module, (given, kwargs) in calls(model, graphs, args).items():
        for training in (True, False):
            graph = graphs[module][0 if training else -1]
            try:
                wanted = _run(module, type(module).forward, given, kwargs, training)
            except Exception:  # the module itself does not run in this mode
                continue
            try:
                got = _run(module, _function(graph), given, kwargs, training)
            except Exception as error:
                return module, f"{type(error).__name__}: {error}"
            difference = differs(got, wanted, _ROUNDINGS)
            if difference:
                return module, difference
    return None


def misread(module: nn.Module, reading: Reading, slots: Any, call: Any) -> str:
    """How a reading differs from what the module computes in one call; "" if it does not.

    Args:
        module: the module; it is left unchanged.
        reading: what was read.
        slots: the positional and keyword arguments that the module was read with.
        call: the same of the call. If it does not match `slots`, nothing is compared.
    """
    expected, shape = pytree.tree_flatten(slots)
    given, shape_given = pytree.tree_flatten(call)
    pairs = list(zip(expected, given, strict=False))
    if shape != shape_given or any(not isinstance(e, Slot) and e is not g for e, g in pairs):
        return ""
    given, named = pytree.tree_map(_copy, call)
    inputs = [_copy(g) for e, g in pairs if isinstance(e, Slot)]
    try:
        wanted, writes = _writing(module, lambda: type(module).forward(module, *given, **named))
    except Exception:  # the module itself does not run in this mode
        return ""
    try:
        got, also = _writing(module, lambda: _follow(module, reading, inputs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if writes - also:  # a reading does not include what the module writes
        return ""
    return differs(got, wanted, _ROUNDINGS)


def reading_of_call(module: nn.Module, call: tuple[Any, Any]) -> Reading:
    """What a recorded call of a module computes, compared with the module itself.

    Args:
        module: the module; it is left unchanged.
        call: the positional and keyword arguments of the call, as from `calls`.

    Raises:
        UntraceableError: a forward that the numbers in tensors steer, or that cannot be followed.
    """

    def copied() -> Any:
        return pytree.tree_map(_copy, call)

    reading = leaving_no_trace(module, lambda: read_call(module, *copied()))

    def wanted() -> Any:
        module.training = reading.training
        args, kwargs = copied()
        return type(module).forward(module, *args, **kwargs)

    def got() -> Any:
        module.training = reading.training
        return _follow(module, reading, leaves_of(copied()))

    try:
        difference = differs(
            leaving_no_trace(module, got), leaving_no_trace(module, wanted), _ROUNDINGS
        )
    except Exception as error:
        difference = f"{type(error).__name__}: {error}"
    if difference:
        raise UntraceableError(f"read by the example, it gives {difference}")
    return reading


def adds_tensors(module: nn.Module, call: tuple[Any, Any]) -> bool:
    """Whether a module's own forward adds two tensors in a recorded call, or cannot be followed.

    Sums of sizes and other numbers are not counted, nor those of its children.
    """
    try:
        graph = reading_of_call(module, call).graph
    except UntraceableError:
        return True
    sums = (node for node in graph.nodes if operation(node).strip("_") in SUMS)
    return any(len(node.all_input_nodes) > 1 for node in sums)


def _writing(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, set[str]]:
    """Run in training mode; return the result and the names of the tensors written to."""

    def watched() -> tuple[Any, set[str]]:
        module.train()
        before = {name: (t, t._version) for name, t in _tensors_of(module)}
        output = run()
        after = {name: (t, t._version) for name, t in _tensors_of(module)}
        names = before.keys() | after.keys()
        return output, {n for n in names if not _same(before.get(n), after.get(n))}

    return leaving_no_trace(module, watched)


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _same(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    return one is not None and other is not None and one[0] is other[0] and one[1] == other[1]


def _follow(module: nn.Module, reading: Reading, inputs: Sequence[Any]) -> Any:
    """Execute a reading."""
    given = iter(inputs)
    env: dict[fx.Node, Any] = {}
    for node in reading.graph.nodes:
        args, kwargs = _arguments((node.args, node.kwargs), env)
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = _copy(reading.constants[str(node.target)])
        elif node.op == "call_module":
            env[node] = reading.modules[node](*args, **kwargs)
        elif node.op == "call_method":
            env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif node.op == "output":
            return args[0]
        else:
            env[node] = node.target(*args, **kwargs)
    raise AssertionError(f"a graph of {type(module).__name__} without an output")


def _arguments(tree: Any, env: Mapping[fx.Node, Any]) -> Any:
    """The values of a node's arguments, in new lists and dicts, as a module may write to them."""
    if isinstance(tree, fx.Node):
        return env[tree]
    if isinstance(tree, dict):
        return {key: _arguments(value, env) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_arguments(value, env) for value in tree]
    if type(tree) is tuple:
        return tuple(_arguments(value, env) for value in tree)
    return fx.node.map_arg(tree, env.__getitem__)


def calls(
    model: nn.Module, modules: Iterable[nn.Module], args: tuple[Any, ...]
) -> dict[nn.Module, tuple[Any, Any]]:
    """The positional and keyword arguments of one call of each module, in a run of the model."""
    found: dict[nn.Module, tuple[Any, Any]] = {}

    def keep(module: nn.Module, given: Any, kwargs: Any) -> None:
        found.setdefault(module, pytree.tree_map(_copy, (given, kwargs)))

    def run() -> None:
        for module in modules:
            module.register_forward_pre_hook(keep, with_kwargs=True)
        model.eval()(*pytree.tree_map(_copy, args))

    try:
        leaving_no_trace(model, run)
    except Exception:  # calls before the error are recorded
        return found
    return found


def _run(
    module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, training: bool
) -> Any:
    given, named = pytree.tree_map(_copy, (args, kwargs))
    return leaving_no_trace(module, lambda: forward(module.train(training), *given, **named))


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """Compile a graph to a function of the module and its inputs."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def differs(got: Any, wanted: Any, roundings: float) -> str:
    """How two outputs differ by more than some roundings; "" if they do not."""
    ones, others = _tensors(got), _tensors(wanted)
    if len(ones) != len(others):
        return f"{len(ones)} tensors instead of {len(others)}"
    for one, other in zip(ones, others, strict=True):
        if one.shape != other.shape:
            return f"a tensor of shape {tuple(one.shape)} instead of {tuple(other.shape)}"
        if not other.is_floating_point():
            if not torch.equal(one, other):
                return "other numbers"
            continue
        precise = torch.float64 if one.dtype == torch.float64 else torch.float32
        one, other = one.to(precise), other.to(precise)
        if not torch.equal(one.isfinite(), other.isfinite()):
            return "other places where it is not finite"
        one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
        error = (one - other).norm() / other.norm().clamp_min(torch.finfo(precise).tiny)
        if error > roundings * torch.finfo(others[0].dtype).eps:
            return f"a relative error of {error.item():.3g}"
    return ""


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in an output, in order, whatever containers hold them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = tuple(output.values())
    elif not isinstance(output, (tuple, list)):
        output = tuple(vars(output).values()) if hasattr(output, "__dict__") else ()
    return [tensor for part in output for tensor in _tensors(part)]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
