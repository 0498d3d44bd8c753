"""Which configuration a product gets, and how its reduction is split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedshape import ACTIVATIONS
from fusedshape.kernels import gemm
from fusedshape.kernels.gemm import CONFIGS, Config, Product
from fusedshape.kernels.host import Gpu

BF16, F32 = torch.bfloat16, torch.float32
H200, A100 = Gpu(90, 132), Gpu(80, 108)
sizes = st.integers(1, 100_000)
problems = st.builds(
    Product,
    st.sampled_from(["fprop", "dgrad", "wgrad"]),
    *(sizes, sizes, st.integers(0, 10_000_000)),
    st.sampled_from([torch.float16, BF16, F32]),
    st.sampled_from(["ieee", "tf32"]),
    *(st.sampled_from([2, 4, 8, 16]), st.booleans(), st.booleans()),
)
gpus = st.builds(Gpu, st.sampled_from([80, 86, 89, 90, 100, 120]), st.integers(1, 200))


@given(problem=problems, gpu=gpus)
def test_there_is_always_one_that_runs(problem: Product, gpu: Gpu) -> None:
    config = gemm.config_for(problem, gpu)
    assert config in gemm.configs_for(problem, gpu)
    assert set(gemm.configs_for(problem, gpu)) <= set(CONFIGS)
    assert config.shared(problem) <= gpu.shared
    assert not config.tma or (gpu.arch >= 90 and problem.describable)


@given(problem=problems, gpu=gpus, splits=st.integers(0, 50))
def test_splits_cover_the_reduction_and_none_is_empty(
    problem: Product, gpu: Gpu, splits: int
) -> None:
    config = replace(gemm.config_for(problem, gpu), splits=splits)
    parts, chunk = gemm._splits(problem, config, gpu)
    steps = config.steps(problem)
    assert parts == 1 or problem.direction == "wgrad"
    assert (parts - 1) * chunk < max(steps, 1)
    assert parts * chunk >= steps
    assert parts <= max(splits, 8 * gpu.processors)


@pytest.mark.parametrize("gpu", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_large_products_take_large_tiles(direction: str, gpu: Gpu) -> None:
    problem = Product(direction, 4096, 4096, 4096, BF16)
    largest = max(c.block_m * c.block_n for c in gemm.configs_for(problem, gpu))
    config = gemm.config_for(problem, gpu)
    assert config.block_m * config.block_n == largest
    assert config.tma == config.persistent == (gpu.arch >= 90)


@given(problem=problems, gpu=gpus)
def test_tiles_are_not_mostly_padding(problem: Product, gpu: Gpu) -> None:
    """Padding is multiplied too: half of a smaller tile at most in either direction."""
    config = gemm.config_for(problem, gpu)
    padded = config.tiles(problem) * config.block_m * config.block_n
    least = min(c.tiles(problem) * c.block_m * c.block_n for c in gemm.configs_for(problem, gpu))
    assert padded <= 2 * least


def test_wgrad_fills_the_gpu() -> None:
    for channels in (64, 256, 1024):
        problem = Product("wgrad", channels, channels, 64 * 14 * 14 * 16, BF16)
        config = gemm.config_for(problem, H200)
        parts, _ = gemm._splits(problem, config, H200)
        assert H200.processors / 2 < parts * config.tiles(problem) <= 2 * H200.processors
        assert parts * problem.m * problem.n * 4 <= 2**26


def test_configurations_are_not_repeated() -> None:
    assert len(set(CONFIGS)) == len(CONFIGS)


def test_slices() -> None:
    straight, curved = (ACTIVATIONS[name].id for name in ("leaky_relu", "tanh"))
    for config, parts in ((Config(128, 256), 4), (Config(128, 64, num_warps=4), 2)):
        assert (config.slices(straight), config.slices(curved)) == (parts, 2 * parts)
    small = Config(64, 64, num_warps=4)
    assert small.slices(straight) == small.slices(curved) == 1
    assert small.slices(straight, mixes=True) == 2
    assert Config(64, 32, num_warps=4).slices(curved, mixes=True) == 1
