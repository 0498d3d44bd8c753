"""Export a converted model as stock PyTorch operations: fold, then torch.export and ONNX.

`fold` multiplies the constants into the weights, so that what runs elsewhere needs no fusedshape.
"""

import torch
from torch import nn

import fusedshape

torch.manual_seed(0)
layers = [m for i in range(16) for m in (nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.ReLU())]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
fusedshape.convert(model, fusedshape.TAT())
image = torch.randn(1, 3, 16, 16)

stock = fusedshape.fold(model.eval())
kinds = sorted({type(module).__name__ for module in stock.modules() if not list(module.children())})
print(f"stock modules: {', '.join(kinds)}")
difference = (stock(image) - model(image)).abs().max() / model(image).abs().max()
print(f"largest relative difference {difference:.0e}")

exported = torch.export.export(stock, (image,))
print(f"torch.export: {len(exported.graph.nodes)} nodes")
program = torch.onnx.export(exported, verbose=False)
print(f"ONNX: {len(program.model.graph)} nodes")  # program.save("model.onnx") writes the file
