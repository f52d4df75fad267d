"""The choice of tiles: a function of shapes and device properties, tested with made-up devices."""

import math

import pytest
import torch

from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton.config import Device, forward_config, grad_input_config, grad_scales_config

H100 = Device((9, 0), 132, 232_448)
A100 = Device((8, 0), 108, 166_912)
L40S = Device((8, 9), 142, 101_376)
BLACKWELL_CONSUMER = Device((12, 0), 170, 101_376)

VIT_LAYERS = [(2304, 768, 3), (768, 768, 1), (3072, 768, 1), (768, 3072, 1), (3840, 1280, 3), (5120, 1280, 1)]


def test_many_tokens_get_the_widest_tile():
    config = forward_config(50_432, 4096, 1024, 1, "half", "boxes", 2, 2, H100)
    assert (config.block_m, config.block_n, config.block_k) == (256, 128, 64)


def test_few_tokens_get_tiles_small_enough_to_use_the_gpu():
    """768 x 768 at one image: 256 x 128 tiles would give work to 6 of 132 multiprocessors."""
    config = forward_config(197, 768, 768, 1, "half", "boxes", 2, 2, H100)
    tiles = math.ceil(197 / config.block_m) * math.ceil(768 / config.block_n)
    assert tiles >= 40


def test_a_tile_is_chosen_for_the_depth_of_its_own_sum():
    """grad_input sums over N, so its depth is block_n; the forward's is block_k."""
    forward = forward_config(50_432, 4096, 1024, 1, "half", "boxes", 2, 2, H100)
    backward = grad_input_config(50_432, 1024, 4096, 1, "half", "boxes", 2, 2, H100)
    assert (forward.block_n, forward.block_k) == (backward.block_k, backward.block_n)


@pytest.mark.parametrize("device", [H100, A100, L40S, BLACKWELL_CONSUMER], ids=lambda d: f"sm_{d.capability}")
@pytest.mark.parametrize("sizes", [(2, 2), (2, 4), (4, 4), (4, 2)])
def test_pipeline_stages_fit_in_shared_memory(device, sizes):
    kinds = ["half"] if sizes[0] == 2 else ["tf32", "ieee"]
    paths = ["vectors", "elements", *(["boxes"] if device.has_wgmma else [])]
    for kind in kinds:
        for path in paths:
            tiles = configs.product_tiles("forward", kind, path, *sizes, device)
            assert tiles
            for t in tiles:
                stage = t.depth * (t.tokens * sizes[0] + t.features * sizes[1])
                assert t.stages >= 2
                assert t.stages * stage + configs.EPILOGUE_BYTES <= device.shared_memory
            for t in configs.scales_tiles(kind, path, sizes[0], device):
                stage = t.tokens * (t.features + t.depth) * sizes[0]
                assert t.stages * stage + configs.EPILOGUE_BYTES <= device.shared_memory


def test_a_smaller_shared_memory_shortens_the_pipeline():
    full = configs.product_tiles("forward", "half", "boxes", 2, 2, H100)[0]
    small = configs.product_tiles("forward", "half", "boxes", 2, 2, Device((9, 0), 132, 120_000))[0]
    assert (full.tokens, full.features) == (small.tokens, small.features)
    assert small.stages < full.stages


@pytest.mark.parametrize(("n", "k", "groups"), VIT_LAYERS)
@pytest.mark.parametrize("m", [1, 197, 6304, 50_432])
def test_splits_cover_the_tokens_within_the_workspace(m, n, k, groups):
    config, split_tokens = grad_scales_config(m, n, k, groups, "half", "boxes", 2, H100)
    assert split_tokens % config.block_m == 0
    splits = math.ceil(m / split_tokens)
    assert (splits - 1) * split_tokens < m <= splits * split_tokens
    n_tiles = groups * math.ceil(n // groups / config.block_n)
    k_tiles = math.ceil(k / config.block_k)
    if splits > 1:
        assert 4 * splits * (k_tiles * n + n_tiles * k + n) <= configs.WORKSPACE_BYTES


def test_splits_fill_the_gpu_where_tiles_alone_do_not():
    config, split_tokens = grad_scales_config(6304, 768, 768, 1, "half", "boxes", 2, H100)
    tiles = math.ceil(768 / config.block_n) * math.ceil(768 / config.block_k)
    programs = tiles * math.ceil(6304 / split_tokens)
    assert programs >= 0.75 * H100.multiprocessors


def test_the_workspace_bound_holds_where_one_more_split_would_pass_it():
    config, split_tokens = grad_scales_config(
        50_432, 16_384, 4096, 1, "half", "boxes", 2, Device((9, 0), 10**4, 232_448)
    )
    splits = math.ceil(50_432 / split_tokens)
    k_tiles, n_tiles = math.ceil(4096 / config.block_k), math.ceil(16_384 / config.block_n)
    assert splits == max(1, configs.WORKSPACE_BYTES // (4 * (k_tiles * 16_384 + n_tiles * 4096 + 16_384)))


def test_arithmetic_follows_dtype_and_flag():
    assert configs.arithmetic(torch.bfloat16, False) == configs.arithmetic(torch.float16, True) == "half"
    assert configs.arithmetic(torch.float32, True) == "tf32"
    assert configs.arithmetic(torch.float32, False) == "ieee"


def test_device_families():
    families = {device: device.has_wgmma for device in (H100, A100, L40S, BLACKWELL_CONSUMER)}
    assert families == {H100: True, A100: False, L40S: False, BLACKWELL_CONSUMER: False}


@pytest.mark.parametrize("device", [H100, A100, L40S, BLACKWELL_CONSUMER], ids=lambda d: f"sm_{d.capability}")
def test_every_path_the_launcher_can_take_has_tiles(device):
    from rlrr_kernels.backends.triton import launch

    aligned, odd = torch.zeros(8, 32), torch.zeros(8, 31)
    for kind in ("half", "tf32", "ieee"):
        for tensor in (aligned, odd):
            path = launch._path(device, kind, tensor)
            assert configs.product_tiles("grad_input", kind, path, 4, 4, device)
            assert configs.scales_tiles(kind, path, 4, device)
