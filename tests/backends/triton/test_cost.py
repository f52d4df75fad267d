"""The performance model, on made-up machines and tiles: what must hold whatever its constants are, and sums by hand."""

from dataclasses import replace

import pytest

from rlrr_kernels.backends.triton import cost
from rlrr_kernels.backends.triton.cost import Device, family, fma_per_cycle, predict_product, predict_scales, resident
from rlrr_kernels.backends.triton.tiles_table import Tile

H100 = Device((9, 0), 132, 232_448)
TILE = Tile(
    block_m=128,
    block_n=128,
    block_k=64,
    num_warps=8,
    num_stages=4,
    registers=128,
    shared=100_000,
    tensor_columns=0,
    slots=200,
    shared_bytes=32_768,
    waits=8,
    outside=500,
)
SHAPES = [(197, 768, 768, 1), (1576, 2304, 768, 3), (6304, 768, 3072, 1), (50_432, 4096, 1024, 1)]


def product(tile=TILE, splits=1, m=6304, n=768, k=768, groups=1, device=H100, kernel="forward", kind="half"):
    return predict_product(kernel, tile, splits, m, n, k, groups, kind, 2, 2, device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", ["forward", "grad_input"])
def test_more_multiprocessors_are_never_slower(shape, kernel):
    m, n, k, groups = shape
    for splits in (1, 3):
        times = [
            product(TILE, splits, m, n, k, groups, replace(H100, multiprocessors=count), kernel).seconds
            for count in (1, 2, 7, 64, 132, 133, 500, 10_000)
        ]
        assert times == sorted(times, reverse=True)
        assert times[0] > times[-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_more_multiprocessors_never_slow_grad_scales_down(shape):
    times = [
        predict_scales(TILE, 256, *shape, "half", 2, 2, replace(H100, multiprocessors=count)).seconds
        for count in (1, 7, 64, 132, 500)
    ]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("kernel", ["forward", "grad_input"])
def test_more_tokens_are_never_faster(kernel):
    times = [product(m=m, n=2304, groups=3, kernel=kernel).seconds for m in range(1, 60_000, 997)]
    assert times == sorted(times)
    assert times[-1] > 5 * times[0]
    scales = [predict_scales(TILE, 256, m, 768, 768, 1, "half", 2, 2, H100).seconds for m in range(1, 60_000, 997)]
    assert scales == sorted(scales)


BUSY = {"m": 50_432, "n": 4096, "k": 8192}
EXTREMES = {
    "tensor cores": (replace(TILE, block_m=256, block_n=256, slots=1, waits=0, num_stages=9), H100),
    "issue": (replace(TILE, slots=5000), H100),
    "shared memory": (replace(TILE, shared_bytes=10**6), H100),
    "L2": (replace(TILE, block_m=16, block_n=64, slots=1, shared_bytes=1, waits=0, num_stages=60), H100),
    "latency": (replace(TILE, waits=300), H100),
    "ends": (replace(TILE, outside=10**6), H100),
    "memory": (TILE, replace(H100, memory_bandwidth=1e9)),
}


@pytest.mark.parametrize("bound", EXTREMES)
def test_what_binds_is_named(bound):
    tile, device = EXTREMES[bound]
    assert product(tile, **BUSY, device=device).bound == bound


def test_a_tiny_product_is_bound_by_its_launch():
    assert product(m=1, n=128, k=64).bound == "launch"


def test_one_wave_by_hand():
    """132 tiles on 132 multiprocessors, one each: 4 steps of what takes longest, one set of ends, one launch."""
    fed = replace(H100, memory_bandwidth=1e15)
    prediction = product(m=128 * 132, n=128, k=256, device=fed)
    tensor = 128 * 128 * 64 / 2048
    chain = 200 * 1.5 + 8 * 25 + tensor * 4 / 8
    from_l2 = 64 * (128 + 128) * 2 / 48
    assert chain > from_l2 > tensor > 900 / 3
    ends = 2 * 900 + 500 * 2 + 128 * 128 * 2 / 48
    assert prediction.seconds == pytest.approx((4 * chain + ends) / 1.83e9 + 2e-6, rel=1e-12)
    quick = product(replace(TILE, waits=1), m=128 * 132, n=128, k=256, device=fed)
    assert quick.seconds == pytest.approx((4 * from_l2 + ends) / 1.83e9 + 2e-6, rel=1e-12)
    assert prediction.useful == pytest.approx(2 * 128 * 132 * 128 * 256 / (2 * 2048 * 132 * 1.83e9), rel=1e-12)


def test_where_w_goes_through_shared_memory_a_block_waits_for_all_its_products():
    """A step is its chain and the products whole; tiles of few tokens go by mma.sync, which waits for none."""
    fed = replace(H100, memory_bandwidth=1e15)
    shared = replace(fed, keeps_operands=False)
    sizes = {"m": 128 * 132, "n": 128, "k": 256}
    slower = product(**sizes, device=shared).seconds - product(**sizes, device=fed).seconds
    assert slower == pytest.approx(4 * 512 * (1 - 4 / 8) / 1.83e9, rel=1e-9)
    few = replace(TILE, block_m=32)
    assert product(few, **sizes, device=shared) == product(few, **sizes, device=fed)
    parts = [cost.table_part(device) for device in (fed, shared, replace(shared, capability=(10, 0)))]
    assert parts == ["sm_90", "sm_90 shared", "sm_100"]


def test_the_last_partial_wave_counts():
    full, one_more = product(m=128 * 132, n=128, k=8192), product(m=128 * 132 + 1, n=128, k=8192)
    assert one_more.seconds > full.seconds + 1e-6
    # the third tile of a multiprocessor waits until the two that fit are done
    two, three = (product(m=128 * 132 * count, n=128, k=8192).seconds for count in (2, 3))
    assert three > 1.4 * two


def test_split_sums_pay_for_their_second_kernel_by_hand():
    one, three = product(m=197, n=768, k=3072), product(m=197, n=768, k=3072, splits=3)
    chain = 200 * 1.5 + 8 * 25 + 512 * 4 / 8
    steps = (48 - 16) * chain
    wider = 128 * 128 * (4 - 2) / 48  # partials are float32
    second = 2e-6 + (900 + 3 * 300) / 1.83e9 + 197 * 768 * (3 * 4 + 2) / (48 * 132 * 1.83e9)
    assert one.seconds - three.seconds == pytest.approx((steps - wider) / 1.83e9 - second, rel=1e-9)


def test_grad_input_steps_over_all_groups():
    assert cost.product_steps("grad_input", replace(TILE, block_n=64), 2304, 768, 3) == 3 * 12
    assert cost.product_steps("grad_input", replace(TILE, block_n=64), 3 * 65, 768, 3) == 3 * 2
    assert cost.product_steps("forward", TILE, 2304, 768, 3) == 12
    assert cost.product_programs("forward", TILE, 129, 3 * 129, 768, 3) == 2 * 3 * 2
    assert cost.product_programs("grad_input", replace(TILE, block_k=64), 129, 3 * 129, 65, 3) == 2 * 2


def test_grad_scales_pays_for_splits_and_their_partial_sums():
    assert cost.scales_partial_bytes(TILE, 2304, 768, 3) == 4 * (12 * 2304 + 18 * 768 + 2304)
    wide = replace(H100, multiprocessors=300)  # of 6 x (12 + 1) programs a split, three splits fill it
    few, some, many = (
        predict_scales(TILE, tokens, 50_432, 768, 768, 1, "half", 2, 2, wide).seconds
        for tokens in (50_432, 16_896, 128)
    )
    assert some < few / 2
    assert some < many / 1.3


def test_residents_by_hand():
    assert resident(TILE, H100) == 2  # 65,536 registers over 128 x 256; and 2 x 101,024 bytes
    assert resident(replace(TILE, registers=129), H100) == 1  # registers come in eights
    assert resident(replace(TILE, registers=40, shared=49_000), H100) == 4
    assert resident(replace(TILE, registers=16, shared=0, num_warps=4), H100) == 16  # 2,048 threads
    assert resident(replace(TILE, registers=16, shared=0, tensor_columns=256), H100) == 2
    assert resident(replace(TILE, registers=255, shared=300_000), H100) == 1


def test_data_sheet_peaks():
    """TFLOP/s of bf16 with float32 sums, dense."""
    boards = {(8, 0): (108, 312), (8, 9): (142, 362), (9, 0): (132, 989), (10, 0): (148, 2250), (12, 0): (170, 209.5)}
    for capability, (count, peak) in boards.items():
        device = Device(capability, count, 100_000)
        assert cost.peak_flops("half", device) / 1e12 == pytest.approx(peak, rel=0.02)
        assert cost.peak_flops("tf32", device) == cost.peak_flops("half", device) / 2
    assert fma_per_cycle("ieee", Device((8, 0), 108, 1)) == 64
    assert fma_per_cycle("ieee", H100) == 128


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        *(((7, 5), "sm_80"), ((8, 7), "sm_89"), ((10, 3), "sm_100"), ((11, 0), "sm_100")),
        *(((12, 1), "sm_120"), ((14, 2), "sm_120")),
    ],
)
def test_an_unknown_gpu_is_served_as_the_nearest_older_one(capability, architecture):
    device = Device(capability, 77, 120_000)
    assert family(device).architecture == architecture
    assert 0 < product(device=device).seconds < 1


def test_a_reported_clock_counts_up_to_the_data_sheets():
    slow, unknown, boost = (product(device=replace(H100, clock_hz=hz)).seconds for hz in (0.9e9, 0, 1.98e9))
    assert boost == unknown
    assert 1.8 < (slow - 2e-6) / (unknown - 2e-6) < 2.1


def test_a_weight_larger_than_the_cache_is_read_with_every_wave():
    shape = {"m": 50_432, "n": 16_384, "k": 16_384}
    slow_memory = replace(H100, memory_bandwidth=1e10)
    small, large = (product(**shape, device=replace(slow_memory, l2_bytes=size)) for size in (2**24, 2**32))
    assert small.bound == large.bound == "memory"
    assert small.seconds > 2 * large.seconds
