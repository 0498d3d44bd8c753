"""Checks of arguments: each returns the value, ready for use, or says what is wrong with it.

Every message names the function or class that was called, the argument, and the value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T")
_LONGEST = 80  # characters of a value in a message


class _Unset:
    def __repr__(self) -> str:
        return "<not given>"


#: The default of an argument whose absence is not the same as None; see `given`.
UNSET: Any = _Unset()


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that were given, those whose value is not `UNSET`.

    Example:
        >>> given(eta=0.9, tau=UNSET)
        {'eta': 0.9}
    """
    return {name: value for name, value in arguments.items() if value is not UNSET}


def shown(value: object) -> str:
    """A value as messages quote it, not too long.

    Example:
        >>> shown("relu"), shown(nn.Parameter(torch.zeros(2)))
        ("'relu'", 'a Parameter of shape (2,)')
    """
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a module of class {type(value).__name__}"
    try:
        text = repr(value)
    except Exception:  # an integer with too many digits, or a broken __repr__
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def number(
    who: str,
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """A finite number as a float, with low ≤ value ≤ high and above < value < below.

    Raises:
        TypeError: a bool, a text, a tensor that is a parameter or requires grad, or anything else
            that is no real number.
        ValueError: a number that is not finite or out of range.

    Example:
        >>> number("f", "scale", 3)
        3.0
    """
    if type(value) is not float:
        value = real(who, name, value)
    if math.isfinite(value) and low <= value <= high and above < value < below:
        return float(value)
    limits = [
        f"{word} {limit:g}"
        for word, limit in (
            ("at least", low),
            ("above", above),
            ("at most", high),
            ("below", below),
        )
        if math.isfinite(limit)
    ]
    raise ValueError(f"{who}: {name} must be {' and '.join(['finite', *limits])}, got {value}")


def real(who: str, name: str, value: Any) -> float:
    """A real number as a float, which may be nan or infinite.

    Raises:
        TypeError: a bool, a text, a tensor that is a parameter or requires grad, or anything else
            that is no real number.
        ValueError: a number that float64 cannot hold.
    """
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter) or value.requires_grad:
            raise TypeError(
                f"{who}: {name} must be a fixed number, got {shown(value)} that would not be "
                f"trained: pass its value, float({name}.detach())"
            )
        if value.ndim or value.is_complex() or value.dtype == torch.bool or value.is_meta:
            raise TypeError(f"{who}: {name} must be a number, got {shown(value)}")
    elif isinstance(value, (bool, str, bytes, bytearray)) or not (
        hasattr(value, "__float__") or hasattr(value, "__index__")
    ):
        raise TypeError(f"{who}: {name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{who}: {name} must be finite, got {shown(value)}") from None
    except Exception:
        raise TypeError(f"{who}: {name} must be a number, got {shown(value)}") from None


def integer(who: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer of at least `low` and, where given, at most `high`.

    Raises:
        TypeError: a bool, or anything else that is no integer.
        ValueError: an integer out of range.

    Example:
        >>> integer("f", "depth", 3, 1)
        3
    """
    if type(value) is not int:
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{who}: {name} must be an int, got {shown(value)}")
        try:
            value = operator.index(value)
        except TypeError:  # an array with several elements
            raise TypeError(f"{who}: {name} must be an int, got {shown(value)}") from None
    if value < low:
        raise ValueError(f"{who}: {name} must be at least {low}, got {shown(value)}")
    if high is not None and value > high:
        raise ValueError(f"{who}: {name}={shown(value)} is beyond {high}; take a smaller one")
    return int(value)


def flag(who: str, name: str, value: Any) -> bool:
    """A bool.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{who}: {name} must be True or False, got {shown(value)}")
    return value


def choice(who: str, name: str, value: Any, known: Iterable[str]) -> str:
    """One of the known words.

    Raises:
        ValueError: another word, or no word.
    """
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        words = ", ".join(map(repr, known))
        raise ValueError(f"{who}: {name}={shown(value)} is unknown; known: {words}")
    return value


def instance(who: str, name: str, value: _T, kind: type[Any], *, optional: bool = False) -> _T:
    """An object of a class, or None where `optional`.

    Raises:
        TypeError: anything else.

    Example:
        >>> instance("f", "model", nn.ReLU(), nn.Module)
        ReLU()
    """
    if isinstance(value, kind) or (optional and value is None):
        return value
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    what = f"{article} {kind.__name__}" + (" or None" if optional else "")
    raise TypeError(f"{who}: {name} must be {what}, got {shown(value)}")


def function(who: str, name: str, value: _T, *, optional: bool = False) -> _T:
    """Something that can be called, or None where `optional`.

    Raises:
        TypeError: anything else.
    """
    if callable(value) or (optional and value is None):
        return value
    what = "callable" + (" or None" if optional else "")
    raise TypeError(f"{who}: {name} must be {what}, got {shown(value)}")


def find_device(name: str | None = None) -> torch.device:
    """The device of that name, if this machine has it; None takes the GPU, or the CPU without one.

    Args:
        name: "cpu", "cuda" or "cuda:1", …

    Raises:
        ValueError: another name, or a GPU that is not there.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device(kind)
    number = int(index or 0) if kind == "cuda" and (index or "0").isdecimal() else None
    if number is None:
        raise ValueError(f"device {name!r}; known: cpu, cuda, or cuda:1 and so on")
    count = torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"device {name!r}: there are {count} CUDA device(s) here; take cpu")
    return torch.device("cuda", number)
