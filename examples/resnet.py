"""Make a ResNet without BatchNorm and without skip connections, and see that it is healthy.

The model is written as torchvision writes its ResNet-18; with torchvision installed, say
`model = torchvision.models.resnet18()` instead.
"""

import torch
from torch import Tensor, nn

import fusedshape
from fusedshape import TAT


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, and a shortcut around them."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            shortcut = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) → (N, planes, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def resnet18(num_classes: int = 1000, width: int = 64) -> nn.Sequential:
    """ResNet-18 for images of three channels."""
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    blocks, planes = [], width
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            blocks.append(BasicBlock(planes, width * 2**stage, stride))
            planes = width * 2**stage
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(planes, num_classes)
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


torch.manual_seed(0)
model = resnet18(num_classes=10, width=32)
images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))

# shortcuts=0.8 would keep them, as 0.8·x + 0.6·f(x).
report = fusedshape.convert(
    model, TAT(), normalisation="strip", shortcuts=0, init="suo_full", example=images
)
print(f"{report.counts['removed']} shortcuts removed, {report.counts['fused']} layers fused")
assert report.health is not None
print(report.health.verdict)

optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
for _step in range(5):
    optimiser.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimiser.step()
print(f"loss {loss.item():.3f} after 5 steps")
