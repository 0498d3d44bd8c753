"""Train an MLP of 50 layers, without normalisation or skip connections, in 20 lines."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fusedshape

torch.manual_seed(0)
x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
train, test = torch.randperm(len(x)).split(1500)
layers = [m for i in range(50) for m in (nn.Linear(64 if i else 65, 64), nn.ReLU())]
model = nn.Sequential(fusedshape.PerLocationNorm(), *layers, nn.Linear(64, 10))
fusedshape.convert(model, fusedshape.TAT())
optimiser = torch.optim.Adam(model.parameters(), lr=5e-4)
for _epoch in range(10):
    for batch in train[torch.randperm(1500)].split(64):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
print(f"test accuracy {accuracy:.1%}")
