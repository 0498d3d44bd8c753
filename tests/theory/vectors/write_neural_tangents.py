"""Writes neural_tangents.json: correlations of wide networks, computed by google/neural-tangents.

Run by hand, in an environment of its own (neural-tangents 0.6.5 wants a jax before 0.5):

    python tests/theory/vectors/write_neural_tangents.py > tests/theory/vectors/neural_tangents.json

`tests/theory/test_closed_forms.py` builds the same networks in torch and compares.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import types
from typing import Any

CS = [-0.9, -0.5, 0.0, 0.3, 0.8, 0.99]


def write() -> None:
    """Compute all cases and print them."""
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    # Its TensorFlow half is not needed here.
    skipped = "neural_tangents.experimental"
    sys.modules[skipped] = types.ModuleType(skipped)
    stax = importlib.import_module("neural_tangents.stax")

    def kernel(layer: Any, c: float) -> Any:
        """The kernel of a layer after a dense one, for two inputs of mean square 1."""
        x = jax.numpy.array([[1.0, 0.0], [c, (1 - c * c) ** 0.5]]) * 2**0.5
        return stax.serial(stax.Dense(1), layer)[2](x, x, "nngp")

    def correlation(layer: Any, c: float) -> float:
        k = kernel(layer, c)
        return float(k[0, 1] / (k[0, 0] * k[1, 1]) ** 0.5)

    def networks(phi: Any) -> dict[str, Any]:
        # Weights that undo the mean square of φ: every layer meets inputs of mean square 1.
        unit = stax.Dense(1, W_std=float(kernel(phi, 1.0)[0, 0]) ** -0.5)
        layer = stax.serial(phi, unit)
        shortcut, branch = (stax.Dense(1, W_std=w) for w in (0.6, 0.8))
        block = stax.serial(
            stax.FanOut(2),
            stax.parallel(shortcut, stax.serial(layer, layer, branch)),
            stax.FanInSum(),
        )
        nets = {"layer": layer, "chain": stax.serial(*[layer] * 8)}
        return {**nets, "resnet": stax.serial(*[block] * 3, layer)}

    phis = {
        "relu": stax.Relu(),
        "leaky_relu": stax.LeakyRelu(0.3),
        "erf": stax.Erf(),
        "gelu_exact": stax.Gelu(),
        "sin": stax.Sin(),
    }
    cases = [
        {"phi": name, "net": net, "c": CS, "out": [correlation(layer, c) for c in CS]}
        for name, phi in phis.items()
        for net, layer in networks(phi).items()
    ]
    versions = {name: importlib.metadata.version(name) for name in ("neural-tangents", "jax")}
    source = "google/neural-tangents, by write_neural_tangents.py beside this file"
    print(json.dumps({"source": source, "versions": versions, "cases": cases}, indent=1))


if __name__ == "__main__":
    write()
