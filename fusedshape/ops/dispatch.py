"""Which backend runs the activation where it is a pass by itself, and why another cannot."""

from __future__ import annotations

from torch import Tensor

from fusedshape.ops.checks import transformed
from fusedshape.ops.engines import BACKENDS, ENGINES, PASSES
from fusedshape.ops.passes import REFERENCE, Kernels
from fusedshape.validate import shown

#: The name of a backend, or "auto"; `backend_names` lists them.
Backend = str


def backend_names() -> tuple[str, ...]:
    """What a call may name as its backend.

    Example:
        >>> backend_names()
        ('auto', 'reference', 'native', 'triton')
    """
    return ("auto", REFERENCE.name, *sorted(BACKENDS.keys() - {REFERENCE.name}))


def choose(backend: str, x: Tensor) -> Kernels:
    """Kernels for a tensor on x's device.

    "auto" takes csrc for CPU tensors, Triton for CUDA tensors, and the reference where that is not
    available (`fusedshape info` says which). Any other name is taken at its word.

    Raises:
        ValueError: unknown backend, or one that does not serve x's device, or kernels named under
            a torch.func transform or an export.
        RuntimeError: the backend is not built or not installed.
    """
    if backend == "auto":
        device = "cpu" if x.is_cpu else x.device.type  # the former is quicker to ask
        found = PASSES.get(device)
        return REFERENCE if found is None or found.unavailable(device) is not None else found
    reason = unavailable(backend, x.device.type)
    if reason is not None:
        raise reason
    if backend != REFERENCE.name and transformed():
        refuse_kernels("backend", backend)
    return BACKENDS[backend]


def refuse_kernels(what: str, name: str) -> None:
    """Raise if `name` means kernels, where plain PyTorch must serve.

    Args:
        what: "backend" or "engine".
        name: of one, or "auto".
    """
    kernels = name in BACKENDS if what == "backend" else not ENGINES[name].plain
    if kernels:
        raise ValueError(
            f"{what} {name!r} cannot run under torch.func transforms, forward-mode AD, "
            "torch.jit.trace or, unless under torch.no_grad, torch.export, nor on tensors of other "
            f"classes; with {what}='auto' plain PyTorch serves them"
        )


def unavailable(backend: str, device: str) -> Exception | None:
    """The error to raise if a call names `backend` on a device of this type; None if it can run.

    Example:
        >>> unavailable("reference", "cpu") is None
        True
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        return ValueError(f"unknown backend {shown(backend)}; known: {', '.join(backend_names())}")
    return BACKENDS[backend].unavailable(device)
