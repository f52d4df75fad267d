"""The choice of tiles: a function of shapes and device properties, tested with made-up devices."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton import cost, tiles_table
from rlrr_kernels.backends.triton.compiler import keeps_operands
from rlrr_kernels.backends.triton.config import (
    WORKSPACE_BYTES,
    Device,
    candidates,
    copy_pays,
    fitting_tiles,
    forward_config,
    grad_input_config,
    grad_scales_config,
    ranked,
)

H100 = Device((9, 0), 132, 232_448)
A100 = Device((8, 0), 108, 166_912)
L40S = Device((8, 9), 142, 101_376)
B200 = Device((10, 0), 148, 232_448)
BLACKWELL_CONSUMER = Device((12, 0), 170, 101_376)
DEVICES = [H100, A100, L40S, B200, BLACKWELL_CONSUMER]

VIT_LAYERS = [(2304, 768, 3), (768, 768, 1), (3072, 768, 1), (768, 3072, 1), (3840, 1280, 3), (5120, 1280, 1)]
PRODUCTS = ("forward", "grad_input")


def device_name(device):
    return f"sm_{device.capability}"


def steps_of(kernel, config, n, k, groups):
    if kernel == "forward":
        return math.ceil(k / config.block_k)
    return groups * math.ceil(n // groups / config.block_n)


def tiles_of(kernel, config, m, n, k, groups):
    out = groups * math.ceil(n // groups / config.block_n) if kernel == "forward" else math.ceil(k / config.block_k)
    return math.ceil(m / config.block_m) * out


def test_many_tokens_get_a_large_tile():
    config = forward_config(50_432, 4096, 1024, 1, "half", "boxes", 2, 2, H100)
    assert config.block_m * config.block_n >= 256 * 128
    assert config.splits == 1


def test_few_tokens_get_tiles_small_enough_to_use_the_gpu():
    """768 x 768 at one image: 256 x 128 tiles would give work to 6 of 132 multiprocessors."""
    for config in (
        forward_config(197, 768, 768, 1, "half", "boxes", 2, 2, H100),
        grad_input_config(197, 768, 768, 1, "half", "boxes", 2, 2, H100),
    ):
        assert config.splits * tiles_of("forward", replace(config, block_n=config.block_n), 197, 768, 768, 1) >= 40


def test_a_deep_sum_of_few_tiles_is_split():
    """768 x 3072 at one image has 48 tiles of 64 x 64, and 48 steps of 64 behind each."""
    forward = forward_config(197, 768, 3072, 1, "half", "boxes", 2, 2, H100)
    backward = grad_input_config(197, 3072, 768, 1, "half", "boxes", 2, 2, H100)
    assert forward.splits > 1
    assert backward.splits > 1
    whole = min(c.prediction.seconds for c in every("forward", 197, 768, 3072) if c.config.splits == 1)
    assert whole > 1.1 * every("forward", 197, 768, 3072)[0].prediction.seconds


def every(kernel, m, n, k, groups=1, device=H100):
    return ranked(kernel, m, n, k, groups, "half", "boxes" if device.has_wgmma else "vectors", 2, 2, device)


@pytest.mark.parametrize("kernel", PRODUCTS)
@pytest.mark.parametrize("m", [1, 49, 197, 1576, 50_432])
def test_splits_cover_the_steps_within_the_workspace_where_tiles_are_few(kernel, m):
    seen = set()
    # the last has more tiles than multiprocessors whatever m is
    for (n, k, groups), device in itertools.product([*VIT_LAYERS, (16_384, 16_384, 1)], DEVICES):
        for choice in every(kernel, m, n, k, groups, device):
            config, splits = choice.config, choice.config.splits
            seen.add(splits)
            steps = steps_of(kernel, config, n, k, groups)
            assert splits == math.ceil(steps / math.ceil(steps / splits)), "a split would be empty"
            if splits > 1:
                assert 4 * splits * m * (n if kernel == "forward" else k) <= WORKSPACE_BYTES
                assert tiles_of(kernel, config, m, n, k, groups) < device.multiprocessors
    assert (max(seen) > 1) == (m <= 197 * 3)


@pytest.mark.parametrize("kernel", [*PRODUCTS, "grad_scales"])
@pytest.mark.parametrize("device", DEVICES, ids=device_name)
def test_a_larger_gpu_is_never_predicted_slower(kernel, device):
    """Of all choices, with the tokens' splits that a larger one adds."""
    for m, (n, k, groups) in itertools.product((1, 197, 6304), VIT_LAYERS):
        sizes = (device.multiprocessors // 2, device.multiprocessors, 2 * device.multiprocessors)
        times = [
            every(kernel, m, n, k, groups, replace(device, multiprocessors=count))[0].prediction.seconds
            for count in sizes
        ]
        assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("device", DEVICES, ids=device_name)
def test_candidates_start_with_the_choice_and_are_few(device):
    path = "boxes" if device.has_wgmma else "vectors"
    for m, (n, k, groups) in itertools.product((1, 197, 50_432), VIT_LAYERS):
        args = (m, n, k, groups, "half", path, 2, 2, device)
        assert candidates("forward", *args)[0] == forward_config(*args)
        assert candidates("grad_input", *args)[0] == grad_input_config(*args)
        assert candidates("grad_scales", *args)[0] == grad_scales_config(m, n, k, groups, "half", path, 2, device)
        for kernel in (*PRODUCTS, "grad_scales"):
            found = candidates(kernel, *args)
            assert len(set(found)) == len(found) <= 150
            times = [choice.prediction.seconds for choice in ranked(kernel, *args)]
            assert times == sorted(times)


def test_the_choice_depends_on_its_arguments_alone():
    args = ("forward", 197, 768, 3072, 1, "half", "boxes", 2, 2)
    first = ranked(*args, H100)
    ranked.cache_clear()
    fitting_tiles.cache_clear()
    assert ranked(*args, Device((9, 0), 132, 232_448)) == first


def test_a_tile_is_chosen_for_the_depth_of_its_own_sum():
    """grad_input sums over N, so its depth is block_n; the forward's is block_k."""
    forward = forward_config(50_432, 4096, 1024, 1, "half", "boxes", 2, 2, H100)
    backward = grad_input_config(50_432, 1024, 4096, 1, "half", "boxes", 2, 2, H100)
    assert (forward.block_n, forward.block_k) == (backward.block_k, backward.block_n)


@pytest.mark.parametrize("device", [*DEVICES, Device((8, 6), 28, 101_376)], ids=device_name)
@pytest.mark.parametrize("sizes", [(2, 2), (2, 4), (4, 4), (4, 2)])
def test_every_path_has_tiles_that_fit(device, sizes):
    kinds = ["half"] if sizes[0] == 2 else ["tf32", "ieee"]
    for kind in kinds:
        for path in ["vectors", "elements", *(["boxes"] if device.has_wgmma and kind != "ieee" else [])]:
            for kernel in ("forward", "grad_input", "grad_scales"):
                tiles = fitting_tiles(kernel, kind, path, *sizes, device)
                assert 0 < len(tiles) <= 6
                for tile in tiles:
                    assert tile.num_stages >= 2
                    assert tile.shared <= device.shared_memory
                    assert tile.registers * 32 * tile.num_warps <= cost.REGISTERS
                    if kernel == "grad_input" and path == "boxes":
                        assert configs.GROUP_STEP % tile.block_n == 0, "a box would run into the next group"


def test_a_smaller_shared_memory_shortens_the_pipeline():
    full = {(t.block_m, t.block_n): t for t in fitting_tiles("forward", "half", "boxes", 2, 2, H100)}
    small_device = Device((9, 0), 132, 120_000)
    shortened = 0
    for tile in fitting_tiles("forward", "half", "boxes", 2, 2, small_device):
        before = full[tile.block_m, tile.block_n]
        stage = cost.stage_bytes("forward", tile, 2, 2)
        if tile.num_stages < before.num_stages:
            shortened += 1
            assert before.shared > 120_000
            assert tile.num_stages * stage + configs.EPILOGUE_BYTES <= 120_000
            assert tile.num_stages == before.num_stages or (tile.num_stages + 1) * stage + 16_384 > 120_000
    assert shortened > 0


def test_a_gpu_without_room_for_any_tile_is_told_so():
    with pytest.raises(ValueError, match=r"device: no tile of forward fits in its 4000 bytes"):
        forward_config(197, 768, 768, 1, "half", "boxes", 2, 2, Device((9, 0), 132, 4000))


@pytest.mark.parametrize(("n", "k", "groups"), VIT_LAYERS)
@pytest.mark.parametrize("m", [1, 197, 6304, 50_432])
def test_token_splits_cover_the_tokens_within_the_workspace(m, n, k, groups):
    config, split_tokens = grad_scales_config(m, n, k, groups, "half", "boxes", 2, H100)
    assert split_tokens % config.block_m == 0
    splits = math.ceil(m / split_tokens)
    assert (splits - 1) * split_tokens < m <= splits * split_tokens
    n_tiles = groups * math.ceil(n // groups / config.block_n)
    k_tiles = math.ceil(k / config.block_k)
    if splits > 1:
        assert 4 * splits * (k_tiles * n + n_tiles * k + n) <= WORKSPACE_BYTES


def test_token_splits_fill_the_gpu_where_tiles_alone_do_not():
    config, split_tokens = grad_scales_config(6304, 768, 768, 1, "half", "boxes", 2, H100)
    tiles = math.ceil(768 / config.block_n) * math.ceil(768 / config.block_k)
    programs = tiles * math.ceil(6304 / split_tokens)
    assert programs >= 0.6 * H100.multiprocessors


def test_the_workspace_bounds_the_token_splits_of_a_huge_gpu():
    huge = Device((9, 0), 10**4, 232_448)
    for choice in every("grad_scales", 50_432, 4096, 1024, device=huge):
        k_tiles, n_tiles = math.ceil(1024 / choice.config.block_k), math.ceil(4096 / choice.config.block_n)
        split = 4 * (k_tiles * 4096 + n_tiles * 1024 + 4096)
        assert math.ceil(50_432 / choice.split_tokens) * split <= WORKSPACE_BYTES
    chosen = every("grad_scales", 50_432, 4096, 1024, device=huge)[0]
    assert math.ceil(50_432 / chosen.split_tokens) > 1


def test_a_copy_first_pays_for_many_tokens_and_not_for_few():
    """At ViT-B's sizes loading by the element takes four times as long; a kernel that copies is a launch more."""
    what = {"kind": "half", "path": "elements", "better": "boxes", "x_size": 2, "weight_size": 2, "device": H100}
    for kernel in ("forward", "grad_input", "grad_scales"):
        width = 3072 if kernel == "forward" else 768
        assert copy_pays(kernel, 12_608, 768, 3072, 1, elements=12_608 * width, **what)
        # the copy alone takes longer than the slow kernel: 3.35 TB/s, read and written
        assert not copy_pays(kernel, 12_608, 768, 3072, 1, elements=450_000_000, **what)
    assert not copy_pays("grad_scales", 16, 768, 768, 1, elements=16 * 768, **what)
    assert cost.copy_seconds(3_350_000, H100) == pytest.approx(2e-6 + cost.LAUNCH_SECONDS)


def test_arithmetic_follows_dtype_and_flag():
    assert configs.arithmetic(torch.bfloat16, False) == configs.arithmetic(torch.float16, True) == "half"
    assert configs.arithmetic(torch.float32, True) == "tf32"
    assert configs.arithmetic(torch.float32, False) == "ieee"


def test_device_families():
    families = {device: device.has_wgmma for device in DEVICES}
    assert families == {H100: True, A100: False, L40S: False, B200: True, BLACKWELL_CONSUMER: False}


@pytest.mark.parametrize("device", [*DEVICES, Device((8, 7), 16, 166_912)], ids=device_name)
def test_every_path_the_launcher_can_take_has_a_choice(device):
    from rlrr_kernels.backends.triton import launch

    aligned, odd = torch.zeros(8, 32), torch.zeros(8, 31)
    for kind, size in (("half", 2), ("tf32", 4), ("ieee", 4)):
        for tensor in (aligned, odd):
            path = launch._path(device, kind, tensor)
            assert grad_input_config(8, 8, tensor.shape[1], 1, kind, path, size, size, device).num_stages >= 2
            assert grad_scales_config(8, 8, tensor.shape[1], 1, kind, path, size, device)[1] > 0


def test_a_gpus_properties_are_read_with_their_units(monkeypatch):
    """An H100's: kHz and bits. What an older PyTorch does not report is left to the family."""
    full = SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=232_448,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
        L2_cache_size=50 * 2**20,
    )
    poor = SimpleNamespace(major=13, minor=1, multi_processor_count=9, shared_memory_per_block_optin=200_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [full, poor].__getitem__)
    configs.cuda_device.cache_clear()
    try:
        device, unknown = configs.cuda_device(0), configs.cuda_device(1)
    finally:
        configs.cuda_device.cache_clear()
    assert device.memory_bandwidth == pytest.approx(3.35e12, rel=0.01)
    assert (device.clock_hz, device.l2_bytes) == (1.98e9, 50 * 2**20)
    assert device.keeps_operands is unknown.keeps_operands is keeps_operands()
    assert unknown == Device((13, 1), 9, 200_000, keeps_operands=keeps_operands())
    assert forward_config(197, 768, 768, 1, "half", "vectors", 2, 2, unknown).num_warps in (4, 8)


def test_the_shipped_table_says_how_it_was_searched():
    table = json.loads(tiles_table.FILE.read_text())
    for architecture, kernels in table["tiles"].items():
        assert architecture in ("sm_80", "sm_89", "sm_90", "sm_90 shared", "sm_100", "sm_120")
        for kernel in kernels:
            assert len(table["searched"][architecture][kernel]["triton"]) >= 1
            for row in table["tiles"][architecture][kernel].values():
                assert 1 <= len(row) <= 6
                assert all(tile["slots"] > 0 and tile["shared"] > 0 and tile["outside"] > 0 for tile in row)
