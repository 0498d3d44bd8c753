"""ActSpec: the frozen constants of one affine-transformed activation y = γ(φ(αx + β) + δ)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from fusedshape.activations import ACTIVATIONS, Activation, get_activation
from fusedshape.compiling import constant_for_dynamo
from fusedshape.files import parse_json, quoted
from fusedshape.validate import instance, number

#: (id, negative_slope, input_scale, input_shift, output_shift, output_scale): what kernels take.
KernelArgs = tuple[int, float, float, float, float, float]


@dataclass(frozen=True)
class ActSpec:
    r"""Constants of φ̂(x) = output_scale · (φ(input_scale · x + input_shift) + output_shift).

    The names are those of google-deepmind/dks. A spec is hashable, compares by value, and survives
    JSON, pickle and deepcopy; `origin` says where the numbers came from and takes no part in
    comparison.

    Args:
        activation: a name of the table in `fusedshape.activations`.
        input_scale: α, not zero.
        input_shift: β.
        output_shift: δ.
        output_scale: γ, not zero.
        negative_slope: slope of leaky_relu for negative arguments; 0 for every other activation.
        origin: free text, e.g. ``"TAT eta=0.9"``.

    Raises:
        ValueError: unknown activation, a constant that is not finite, a zero scale, or a
            negative_slope given to an activation that has none.
        TypeError: a constant that is not a number, or a tensor that requires grad: the constants
            are fixed, so no gradient would reach it.

    Example:
        >>> spec = ActSpec("leaky_relu", negative_slope=0.3, output_scale=1.35)
        >>> ActSpec.from_json(spec.to_json()) == spec
        True
    """

    activation: str
    input_scale: float = 1.0
    input_shift: float = 0.0
    output_shift: float = 0.0
    output_scale: float = 1.0
    negative_slope: float = 0.0
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        row = get_activation(self.activation, "ActSpec")
        instance("ActSpec", "origin", self.origin, str)
        for name in CONSTANTS:
            object.__setattr__(self, name, number("ActSpec", name, getattr(self, name)))
        for name in ("input_scale", "output_scale"):
            if getattr(self, name) == 0:
                raise ValueError(f"ActSpec: {name} must not be 0, the output would be constant")
        if self.negative_slope != 0 and not row.has_slope:
            raise ValueError(
                f"ActSpec: {self.activation} takes no negative_slope, got {self.negative_slope}; "
                "leave it at 0 or use leaky_relu"
            )
        # The output of a falling leaky_relu does not tell the branch. Nor does that of a flat one
        # whose constant branch is γδ, which is rounded, instead of an exact zero.
        flat = row.homogeneous and self.negative_slope == 0
        tells = self.negative_slope >= 0 and not (flat and self.output_shift != 0)
        readable = row.saves == "output" and tells
        in_half = readable and row.homogeneous and self.output_shift == 0
        # Kept beside the fields, because ops read them on every call.
        kept = {
            "kernel_args": (row.id, *(getattr(self, name) for name in CONSTANTS)),
            "readable": readable,
            "readable_in_half": in_half,
            "text": json.dumps([self.activation, *(getattr(self, name) for name in CONSTANTS)]),
        }
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    #: The constants as kernels take them.
    kernel_args: KernelArgs = field(init=False, repr=False, compare=False)
    #: Whether φ′ can be read off the output in float32 and float64; see `saves_output`.
    readable: bool = field(init=False, repr=False, compare=False)
    #: The same in bfloat16 and float16.
    readable_in_half: bool = field(init=False, repr=False, compare=False)
    #: The constants as a string, exact; see `static`.
    text: str = field(init=False, repr=False, compare=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What is kept beside the fields may mean something else in the version that unpickles.
        ActSpec.__init__(self, **{f.name: state[f.name] for f in fields(self) if f.init})

    @property
    def saves_output(self) -> bool:
        """`saves_output(self, torch.float32)`, for those who have no dtype to ask for."""
        return self.readable

    def __fx_create_arg__(self, tracer: Any) -> Any:
        # torch.fx cannot keep an object in a graph, so the graph calls what makes it.
        return tracer.create_node("call_function", from_text, (self.text,), {})

    @property
    def row(self) -> Activation:
        """The row of the activation table."""
        return get_activation(self.activation)

    @property
    def foldable(self) -> bool:
        """Whether γ moves into the layer before exactly: γφ(z) = φ(γz), no shifts, α = 1."""
        return (
            self.row.homogeneous
            and self.output_scale > 0
            and self.input_scale == 1
            and self.input_shift == 0
            and self.output_shift == 0
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of the constructor's arguments."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ActSpec:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a key that is no field of ActSpec, or no activation.
        """
        instance("ActSpec.from_dict", "data", data, dict)
        known = {f.name for f in fields(cls) if f.init}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"ActSpec: unknown field(s) {unknown}; known: {sorted(known)}")
        if "activation" not in data:
            raise ValueError("ActSpec: the field 'activation' is missing; it names the function")
        return cls(**data)

    def to_json(self) -> str:
        """JSON text; floats keep every bit."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> ActSpec:
        """Inverse of `to_json`.

        Raises:
            ValueError: text that is not a JSON object of ActSpec's fields.
            TypeError: no text, or a constant that is not a number.
        """
        data = parse_json(text, "ActSpec: the text")
        if not isinstance(data, dict):
            raise ValueError(f"ActSpec: expected a JSON object, got {quoted(data)}")
        return cls.from_dict(data)


def saves_output(spec: ActSpec, dtype: torch.dtype) -> bool:
    """Whether backward of a layer in `dtype` works from its output; if not, from its input.

    Rounding to half precision moves an output by up to 2⁻⁹ (bfloat16) or 2⁻¹² (float16) of itself.
    φ′ cannot be read off such an output where φ saturates, or where δ has moved a kink away from 0.
    For relu and leaky_relu with δ = 0 it can be, since φ′ depends on the sign alone, and rounding
    keeps signs.

    Args:
        spec: the constants.
        dtype: of the layer's input and output.

    Example:
        >>> leaky, tanh = ActSpec("leaky_relu", negative_slope=0.5), ActSpec("tanh")
        >>> saves_output(leaky, torch.bfloat16), saves_output(tanh, torch.bfloat16)
        (True, False)
        >>> saves_output(tanh, torch.float32)
        True
    """
    # Not a method: Dynamo cannot call methods of the specs that `static` makes.
    return spec.readable_in_half if is_half(dtype) else spec.readable


def is_half(dtype: torch.dtype) -> bool:
    """Whether `dtype` is bfloat16 or float16."""
    return dtype in (torch.bfloat16, torch.float16)


def static(spec: ActSpec) -> ActSpec:
    """Return the same spec in a form that torch.compile takes as a constant.

    Once Dynamo has seen a float with two values, it makes an input of it, which its support of
    autograd.Function cannot handle. It keeps strings as constants, so the spec is made from one.
    """
    return from_text(spec.text) if torch.compiler.is_compiling() else spec


@constant_for_dynamo
def from_text(text: str) -> ActSpec:
    """Make the spec whose `ActSpec.text` is given.

    Example:
        >>> from_text(ActSpec("relu", output_scale=2.0).text).output_scale
        2.0
    """
    activation, *numbers = json.loads(text)
    return ActSpec(activation, **dict(zip(CONSTANTS, numbers, strict=True)))


def from_torch(name: str, options: Mapping[str, Any]) -> ActSpec | None:
    """Make the spec that computes what one of torch's activations does.

    Args:
        name: what torch calls the function, or a key of `ACTIVATIONS`.
        options: its arguments after the tensor by name; those left out have their defaults.

    Returns:
        The spec; None where no row of the table computes it, or an argument is not known yet.

    Example:
        >>> spec = from_torch("celu", {"alpha": 2.0})
        >>> spec.activation, spec.input_scale, spec.output_scale
        ('elu', 0.5, 2.0)
        >>> from_torch("mish", {}) is None
        True
    """
    found = [(row, known) for row in ACTIVATIONS.values() for known in row.names]
    found = [(row, known) for row, known in found if known.name == name]
    for row, known in found:
        given = {key: options.get(key, default) for key, default in known.options.items()}
        unknown = any(
            isinstance(default, float) and not isinstance(given[key], (int, float))
            for key, default in known.options.items()
        )
        constants = None if unknown else known.constants(**given)
        if constants is not None:
            return ActSpec(row.name, **constants)
    return ActSpec(name) if not found and name in ACTIVATIONS else None


CONSTANTS = ("negative_slope", "input_scale", "input_shift", "output_shift", "output_scale")
