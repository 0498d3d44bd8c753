"""Gives a module another forward: a subclass of its class that pickles, made from fx graphs."""

from __future__ import annotations

import functools
import inspect
import linecache
import types
from typing import Any

from torch import fx, nn


class Rewritten:
    """Base class of all classes that `subclass` makes.

    Attributes:
        written_by: the prefix that was given to `subclass`.
    """

    __slots__ = ()
    written_by: str


def why_not(module: nn.Module) -> str:
    """Why no subclass of a module's class could pickle; "" if one can."""
    if isinstance(module, Rewritten):
        return ""
    cls = type(module)
    own = (cls.__reduce_ex__, cls.__reduce__) != (object.__reduce_ex__, object.__reduce__)
    if own or hasattr(cls, "__getnewargs_ex__"):
        return f"{cls.__name__} pickles in its own way"
    return ""


def source(graph: fx.Graph) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """A graph's source as a function `forward`, and the globals it needs beyond fx's usual ones."""
    code = graph.python_code("self")
    extra = {k: v for k, v in code.globals.items() if k not in _usual_globals()}
    return code.src.strip() + "\n", tuple(sorted(extra.items()))


@functools.cache
def _usual_globals() -> dict[str, Any]:
    return dict(fx.Graph().python_code("self").globals)


def subclass(
    base: Any, sources: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...], prefix: str = "Shaped"
) -> type[nn.Module]:
    """Make a subclass of a module's class with another forward.

    The same arguments give the same class, so that equal modules go on sharing compiled code.

    Args:
        base: the module's class. If `subclass` made it, its own base is taken instead.
        sources: results of `source`: one for both modes, or training's and evaluation's.
        prefix: start of the new class's name.

    Returns:
        A class to assign to a module's `__class__`; its instances pickle.
    """
    return _made(base.__bases__[0] if issubclass(base, Rewritten) else base, sources, prefix)


@functools.cache
def _made(base: Any, sources: Any, prefix: str) -> type[nn.Module]:
    forwards = []
    for text, extra in sources:
        scope = {**_usual_globals(), **dict(extra), "__name__": base.__module__}
        file = f"<fusedshape {base.__qualname__} {abs(hash(text))}>"
        # Lets tracebacks and inspect.getsource show the source.
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), scope)
        forwards.append(scope["forward"])

    def by_mode(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forwards[0 if self.training else 1](self, *args, **kwargs)

    forward: Any = forwards[0] if len(forwards) == 1 else by_mode
    forward.__doc__ = base.forward.__doc__
    forward.__signature__ = inspect.signature(base.forward)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        # The class has no importable name, but its base has.
        _, arguments, *rest = tuple(object.__reduce_ex__(self, max(2, protocol)))
        return (_revive, (base, sources, prefix, *arguments[1:]), *rest)

    namespace: dict[str, Any] = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__reduce_ex__": reduce_ex,
        "forward": forward,
        "written_by": prefix,
    }
    if len(forwards) == 2:
        namespace |= {"forward_training": forwards[0], "forward_evaluation": forwards[1]}
    return types.new_class(
        f"{prefix}{base.__name__}", (base, Rewritten), exec_body=lambda ns: ns.update(namespace)
    )


def _revive(base: Any, sources: Any, prefix: str, *arguments: Any) -> nn.Module:
    cls = _made(base, sources, prefix)
    return cls.__new__(cls, *arguments)
