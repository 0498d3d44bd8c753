"""Ctrl-C pretended at any line, and all that a change of a model may touch."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def state(model: nn.Module) -> list[Any]:
    """Everything that a change may touch."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found += [name, id(module), type(module)]
        for key, value in vars(module).items():
            held = value if isinstance(value, (dict, list)) else ()
            found += [key, id(value)]
            found += [
                (k, id(v)) for k, v in (held.items() if isinstance(held, dict) else enumerate(held))
            ]
    for name, tensor in model.state_dict().items():
        found += [name, tensor.numpy().tobytes()]
    return [*found, torch.get_rng_state().numpy().tobytes(), torch.is_grad_enabled()]


def interrupted_at(step: int, function: Any, code_of: Any) -> bool:
    """Whether a function was still running at its step-th line, where Ctrl-C is pretended."""
    left = [step]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not code_of(frame.f_code):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
