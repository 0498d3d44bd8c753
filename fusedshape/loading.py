"""What a user names as `pkg.module:name`: found, called, and checked."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

from torch import nn


class FactoryError(RuntimeError):
    """The user's own code raised something; the message says what and where."""


def is_path(value: object) -> bool:
    """Whether a value has the form ``pkg.module:name``.

    Example:
        >>> is_path("pkg.module:factory"), is_path("pkg.module.factory")
        (True, False)
    """
    if not isinstance(value, str):
        return False
    module, colon, name = value.partition(":")
    parts = [*module.split("."), *name.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def load_object(path: str) -> Any:
    """Import ``pkg.module:name``, from the current folder too.

    Raises:
        ValueError: another form, or no such name.
        ImportError: no such module, or one that cannot be imported.

    Example:
        >>> load_object("math:pi")
        3.141592653589793
    """
    if not is_path(path):
        raise ValueError(f"{path!r} must have the form pkg.module:name")
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise ImportError(f"{path}: importing {module} raised {_said(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"module {module!r} has no {name!r}")
        found = getattr(found, part)
    return found


def make(path: str, **arguments: Any) -> Any:
    """Call ``pkg.module:factory``.

    Raises:
        TypeError: what is there cannot be called.
        FactoryError: the factory raised something.
        ValueError, ImportError: as `load_object`.

    Example:
        >>> make("builtins:dict", a=1)
        {'a': 1}
    """
    factory = load_object(path)
    if not callable(factory):
        raise TypeError(f"{path} is no function or class, but {factory!r:.60}")
    try:
        return factory(**arguments)
    except Exception as error:
        raise FactoryError(f"{path} raised {_said(error)}") from error


def make_model(path: str, **arguments: Any) -> nn.Module:
    """Call ``pkg.module:factory``, which must return an nn.Module.

    Raises:
        TypeError: it returns something else.
        FactoryError, ValueError, ImportError: as `make`.

    Example:
        >>> make_model("torch.nn:Linear", in_features=3, out_features=2)
        Linear(in_features=3, out_features=2, bias=True)
    """
    model = make(path, **arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{path} returned {type(model).__name__}, not an nn.Module")
    return model


def _said(error: Exception) -> str:
    """An error of a user's code, with the line it comes from."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, (ImportError, SyntaxError)):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({last.filename}, line {last.lineno})"
