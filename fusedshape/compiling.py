"""What torch.compile is told about this package's functions, without importing Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_for_dynamo(function: _F) -> _F:
    """Let torch.compile call `function` while it traces, and keep the answer as a constant.

    Without this Dynamo traces into the function's body, and breaks the graph where that asks a
    driver, reads a file or looks into a cache. The answer must depend on the arguments alone, and
    these must be constants for Dynamo too.

    It sets the mark that torch.compiler.assume_constant_result sets; that function imports Dynamo,
    which takes seconds, and so it cannot be called when this package is imported.

    Example:
        >>> @constant_for_dynamo
        ... def vendor() -> str:
        ...     return "AuthenticAMD"
        >>> vendor()
        'AuthenticAMD'
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
