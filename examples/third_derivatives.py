"""Solve u''' = -cos x with u(0) = 0, u'(0) = 1, u''(0) = 0 by a deep network; u is sin x.

A physics-informed network needs derivatives of its output by its input, here three of them, and the
gradient of the loss takes one more. Shaped activations give all of them, to the precision of the
dtype.
"""

import torch
from torch import nn

import fusedshape

DEPTH, WIDTH, POINTS, STEPS = 6, 20, 32, 100


def derivatives(model: nn.Module, x: torch.Tensor, order: int) -> list[torch.Tensor]:
    """u, u', u'', … at every x."""
    found = [model(x)]
    for _ in range(order):
        found += torch.autograd.grad(found[-1].sum(), x, create_graph=True)
    return found


torch.manual_seed(0)
layers = [m for i in range(DEPTH) for m in (nn.Linear(WIDTH if i else 1, WIDTH), nn.ReLU())]
model = nn.Sequential(*layers, nn.Linear(WIDTH, 1)).double()
fusedshape.convert(model, fusedshape.DKS("tanh"))

x = torch.linspace(0, 3, POINTS, dtype=torch.float64).unsqueeze(1).requires_grad_()
optimiser = torch.optim.LBFGS(model.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")


def loss() -> torch.Tensor:
    """Mean square of what is left of the equation, and of the three conditions at 0."""
    u, u1, u2, u3 = derivatives(model, x, 3)
    start = u[0] ** 2 + (u1[0] - 1) ** 2 + u2[0] ** 2
    total = (u3 + x.cos()).square().mean() + start.sum()
    optimiser.zero_grad()
    total.backward()
    return total


optimiser.step(loss)
print(f"largest error of u {(model(x) - x.sin()).abs().max():.1e}")
