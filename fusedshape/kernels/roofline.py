"""Bytes and FLOPs of each convolution kernel, and a lower bound of the time a GPU needs for them.

This is arithmetic: no Triton, no device. A kernel's traffic counts once every element that it must
touch. Nothing is faster than ``max(bytes / bandwidth, flops / rate)``; tiles that are read several
times make real kernels slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Arithmetic = Literal["float16", "bfloat16", "tf32", "float32"]
Kernel = Literal[
    "conv", "conv_act", "conv_dgrad", "conv_dgrad_act", "conv_wgrad", "act", "act_grad"
]
KERNELS: tuple[Kernel, ...] = (
    *("conv", "conv_act", "conv_dgrad", "conv_dgrad_act", "conv_wgrad", "act", "act_grad"),
)


class Geometry(NamedTuple):
    """Where the taps of a convolution lie; of rows and of columns each.

    Attributes:
        kernel: (R, S), taps.
        stride: distance of the outputs' first taps.
        padding: zeros on either side.
        dilation: distance of taps.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """A convolution of `batch` images of (channels, height, width), in one group.

    Attributes:
        batch: images.
        channels: of the input, C.
        height: of the input, H.
        width: of the input, W.
        out_channels: of the output, K.
        kernel: (R, S), rows and columns of taps.
        stride: of rows and columns.
        padding: zeros on either side of rows and columns.
        dilation: distance of taps.
        arithmetic: how products are computed; sums are float32.

    Raises:
        ValueError: no output.

    Example:
        >>> stem = Convolution(32, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3))
        >>> stem.out_height, stem.out_width
        (112, 112)
    """

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    arithmetic: Arithmetic = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.out_height, self.out_width) < 1:
            raise ValueError(
                f"Convolution: a kernel of {self.kernel} with dilation {self.dilation} reaches "
                f"beyond an input of {(self.height, self.width)} padded by {self.padding}; pad more"
            )

    def _out(self, size: int, d: int) -> int:
        reach = self.dilation[d] * (self.kernel[d] - 1) + 1
        return (size + 2 * self.padding[d] - reach) // self.stride[d] + 1

    @property
    def out_height(self) -> int:
        """Rows of the output, P."""
        return self._out(self.height, 0)

    @property
    def out_width(self) -> int:
        """Columns of the output, Q."""
        return self._out(self.width, 1)

    @property
    def output(self) -> tuple[int, int, int, int]:
        """Shape of the output, (N, K, P, Q)."""
        return self.batch, self.out_channels, self.out_height, self.out_width

    @property
    def pixels(self) -> int:
        """Pixels of all outputs, N · P · Q."""
        return self.batch * self.out_height * self.out_width

    @property
    def geometry(self) -> Geometry:
        """Where its taps lie."""
        return Geometry(self.kernel, self.stride, self.padding, self.dilation)

    @property
    def taps(self) -> int:
        """R · S."""
        return self.kernel[0] * self.kernel[1]

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.out_channels * self.channels * self.taps

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 2 if self.arithmetic in ("float16", "bfloat16") else 4

    @property
    def is_gemm(self) -> bool:
        """Whether the convolution is one product of two matrices: 1×1, stride 1, no padding."""
        return self.kernel == (1, 1) == self.stride and self.padding == (0, 0)


class Traffic(NamedTuple):
    """The least that a kernel has to do.

    Attributes:
        bytes: read from and written to global memory.
        flops: multiplications and additions of the product; the activation is not counted.
    """

    bytes: int
    flops: int


def traffic(
    problem: Convolution, kernel: Kernel, *, residual: bool = False, splits: int = 1
) -> Traffic:
    """Bytes and FLOPs of one kernel.

    With x, y, w the elements of input, output and weight, and i bytes an element:

    ===============  ============================================  =================
    kernel           bytes                                         FLOPs
    ===============  ============================================  =================
    conv             i (x′ + w + y)                                2 N P Q K C R S
    conv_act         the same + 4 K (+ i y for a residual)         the same
    conv_dgrad       i (y + w + x)                                 the same
    conv_dgrad_act   the same + i x (what was saved) + 4 C         the same
    conv_wgrad       i (y + x′ + w) + 8 w · splits if splits > 1   the same
    act              2 i y + 4 K                                   0
    act_grad         3 i y + 4 K                                   0
    ===============  ============================================  =================

    x′ leaves out the pixels that no tap reads, as in a 1×1 convolution of stride 2. `act` and
    `act_grad` are the passes after a convolution that is not fused.

    Args:
        problem: the convolution.
        kernel: which of `KERNELS`.
        residual: whether conv_act adds one.
        splits: parts of wgrad's sum over pixels.

    Example:
        >>> layer = Convolution(32, 64, 56, 56, 64)
        >>> traffic(layer, "conv_act")
        Traffic(bytes=25764096, flops=7398752256)
        >>> traffic(layer, "act").bytes
        25690368
    """
    p = problem
    x = p.batch * p.channels * p.height * p.width
    x_read = p.batch * p.channels * _read(p, p.height, 0) * _read(p, p.width, 1)
    y, w, i = p.pixels * p.out_channels, p.weights, p.itemsize
    flops = 2 * p.pixels * w
    if kernel == "conv":
        return Traffic(i * (x_read + w + y), flops)
    if kernel == "conv_act":
        return Traffic(i * (x_read + w + y * (1 + residual)) + 4 * p.out_channels, flops)
    if kernel == "conv_dgrad":
        return Traffic(i * (y + w + x), flops)
    if kernel == "conv_dgrad_act":
        return Traffic(i * (y + w + 2 * x) + 4 * p.channels, flops)
    if kernel == "conv_wgrad":
        return Traffic(i * (y + x_read + w) + (8 * w * splits if splits > 1 else 0), flops)
    if kernel == "act":
        return Traffic(2 * i * y + 4 * p.out_channels, 0)
    if kernel == "act_grad":
        return Traffic(3 * i * y + 4 * p.out_channels, 0)
    raise ValueError(f"traffic: kernel={kernel!r} is unknown; known: {', '.join(KERNELS)}")


def _read(p: Convolution, size: int, d: int) -> int:
    """Number of rows (or columns) of the input that some tap reads."""
    taps = range(0, p.dilation[d] * p.kernel[d], p.dilation[d])
    outputs = range(p._out(size, d))
    rows = {o * p.stride[d] - p.padding[d] + t for o in outputs for t in taps}
    return sum(0 <= row < size for row in rows)


@dataclass(frozen=True)
class Roof:
    """The most that one GPU can do.

    Attributes:
        name: of the GPU.
        bandwidth: bytes a second, read and written together.
        half: FLOP/s of float16 and bfloat16 products, dense.
        tf32: FLOP/s of tf32 products, dense.
        float32: FLOP/s without tensor cores.
        source: where the numbers come from.
    """

    name: str
    bandwidth: float
    half: float
    tf32: float
    float32: float
    source: str

    def rate(self, arithmetic: Arithmetic) -> float:
        """FLOP/s of products."""
        if arithmetic in ("float16", "bfloat16"):
            return self.half
        return self.tf32 if arithmetic == "tf32" else self.float32

    def seconds(self, cost: Traffic, arithmetic: Arithmetic = "bfloat16") -> float:
        """Lower bound of the time for `cost`: that of its bytes or its FLOPs, whichever is longer.

        Example:
            >>> cost = traffic(Convolution(256, 64, 56, 56, 64), "conv_act")
            >>> round(1e6 * ROOFS["A100"].seconds(cost))
            190
        """
        return max(cost.bytes / self.bandwidth, cost.flops / self.rate(arithmetic))


_PEAK = "data sheet, SXM"
ROOFS: dict[str, Roof] = {
    roof.name: roof
    for roof in (
        Roof("A100", 2.039e12, 312e12, 156e12, 19.5e12, f"{_PEAK}, 80 GB"),
        Roof("H100", 3.35e12, 989e12, 494e12, 67e12, _PEAK),
        Roof(
            *("H200", 4.3e12, 780e12, 494e12, 67e12),
            "measured: copying memory, bfloat16 products of 8192³; data sheet: tf32, float32",
        ),
        Roof("B200", 8.0e12, 2250e12, 1100e12, 75e12, _PEAK),
    )
}


class Layer(NamedTuple):
    """A convolution of a network.

    Attributes:
        name: stage and what it is.
        problem: the convolution.
        count: how often the network has it.
    """

    name: str
    problem: Convolution
    count: int


def resnet50(batch: int, arithmetic: Arithmetic = "bfloat16") -> list[Layer]:
    """The 53 convolutions of ResNet-50 at 224 × 224, stride in the 3×3, equal ones listed once.

    Args:
        batch: images.
        arithmetic: what is multiplied.

    Example:
        >>> layers = resnet50(1)
        >>> sum(layer.count for layer in layers)
        53
        >>> flops = sum(n * traffic(problem, "conv").flops for _, problem, n in layers)
        >>> round(flops / 2e9, 2)
        4.09
    """
    return [
        Layer(name, replace(problem, arithmetic=arithmetic), count)
        for name, problem, count in _resnet50(batch)
    ]


def _resnet50(batch: int) -> Iterator[Layer]:
    def conv(
        c: int, size: int, k: int, kernel: int = 1, stride: int = 1, padding: int = 0
    ) -> Convolution:
        return Convolution(
            batch, c, size, size, k, (kernel, kernel), (stride, stride), (padding, padding)
        )

    yield Layer("stem 7x7/2", conv(3, 224, 64, 7, 2, 3), 1)
    before, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        mid = 32 * 2**stage
        out, stride, after = 4 * mid, 1 if stage == 1 else 2, size if stage == 1 else size // 2
        yield Layer(f"{stage} first 1x1", conv(before, size, mid), 1)
        name = f"{stage} 3x3"
        if stride == 2:
            yield Layer(name + "/2", conv(mid, size, mid, 3, 2, 1), 1)
        same = blocks if stride == 1 else blocks - 1
        yield Layer(name, conv(mid, after, mid, 3, 1, 1), same)
        yield Layer(f"{stage} up 1x1", conv(mid, after, out), blocks)
        short = f"{stage} shortcut 1x1" + ("/2" if stride == 2 else "")
        yield Layer(short, conv(before, size, out, 1, stride), 1)
        yield Layer(f"{stage} down 1x1", conv(out, after, mid), blocks - 1)
        before, size = out, after
