"""How long a kernel would take: a model of the machine, from data sheets and from counted instructions.

The multiprocessor with the most programs decides. It holds a few programs at once; while
it does, a step of the loop takes as long as the busiest of its resources (tensor cores,
schedulers, shared memory, its port to L2), or as long as one warp needs for its own chain
of instructions and waits, whichever is longer. To the steps come filling the pipeline, what lies
outside the loop, launches, and for split sums the second kernel. Traffic with the GPU's memory
overlaps all of it and can only be the longer of the two.

Nothing here has been measured on a GPU: constants marked "assumed" are there to be
fitted once something has. Every function is a pure function of its arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from rlrr_kernels.backends.triton.tiles_table import Arithmetic, Kernel, Product, Tile


@dataclass(frozen=True)
class Device:
    """What a choice depends on. 0 stands for "not known": the family's typical value is taken.

    ``shared_memory``: bytes one block may opt in to. ``clock_hz``: the highest clock of the multiprocessors.
    ``l2_bytes``: size of the L2 cache. ``memory_bandwidth``: bytes a second of the GPU's memory.
    ``keeps_operands``: whether the installed compiler can be trusted with wgmma's register operand (``compiler.py``).
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    clock_hz: float = 0.0
    l2_bytes: int = 0
    memory_bandwidth: float = 0.0
    keeps_operands: bool = True

    @property
    def has_wgmma(self) -> bool:
        """Hopper and data-centre Blackwell: tensor cores that read shared memory, fed by the copy engine (TMA)."""
        return 9 <= self.capability[0] < 12

    @property
    def weight_left(self) -> bool:
        """Whether W' is the left operand of its products: then it goes from registers to such tensor cores.

        On the right it goes through shared memory there; ``mma.sync`` takes both sides from registers.
        """
        return self.has_wgmma and (self.keeps_operands or self.capability[0] > 9)


@dataclass(frozen=True)
class Family:
    """A multiprocessor of one compute capability, and what a typical GPU has around it."""

    architecture: str  # the rows of the tile table that serve it
    half_fma: int  # bf16 or fp16 multiply-adds a cycle, float32 sums
    threads: int  # resident at once
    clock_hz: float  # at which the data sheet's peak is stated
    l2_bytes: int
    memory_bandwidth: float


# half_fma = dense peak / (2 x multiprocessors x clock), from NVIDIA's data sheets and whitepapers: A100 312 TFLOP/s
# (108 at 1.41 GHz), A40 150 (84 at 1.74), L40S 362 (142 at 2.52), H100 SXM 989 (132 at 1.83), B200 2,250 (148 at
# 1.85), RTX 5090 209.5 (170 at 2.41; other sm_120 boards may do twice as much a cycle). GeForce boards of 8.6 and
# 8.9 do half of what is stated here; the capability does not tell.
FAMILIES: dict[tuple[int, int], Family] = {
    (8, 0): Family("sm_80", 1024, 2048, 1.410e9, 40 * 2**20, 2.039e12),
    (8, 6): Family("sm_89", 512, 1536, 1.740e9, 6 * 2**20, 0.696e12),
    (8, 9): Family("sm_89", 512, 1536, 2.520e9, 96 * 2**20, 0.864e12),
    (9, 0): Family("sm_90", 2048, 2048, 1.830e9, 50 * 2**20, 3.350e12),
    (10, 0): Family("sm_100", 4096, 2048, 1.850e9, 126 * 2**20, 8.000e12),
    (12, 0): Family("sm_120", 256, 1536, 2.407e9, 96 * 2**20, 1.792e12),
}

REGISTERS = 65_536  # 32-bit, of a multiprocessor, on all of them
RESIDENT_BLOCKS = 24  # on the smallest of them
SCHEDULERS = 4
TENSOR_COLUMNS = 512
SHARED_BYTES_PER_CYCLE = 128

#: Bytes a cycle that a multiprocessor gets from L2 while all ask, most of them for lines that another asks
#: for too. Assumed: its port carries 64, microbenchmarks of single streams show half of that.
L2_BYTES_PER_CYCLE = 48

#: Cycles until a load from memory has arrived. Assumed: microbenchmarks show 500 to 900, unloaded.
MEMORY_LATENCY = 900

#: The same from L2. Assumed: microbenchmarks show 200 to 300.
L2_LATENCY = 300

#: Cycles from one instruction of a warp to its next, where no other warp fills the gaps. Assumed: a result
#: takes 4, and unrolled loops have two or three chains to turn to.
CYCLES_PER_INSTRUCTION = 1.5

#: Cycles for which a barrier or a wait holds a warp up once what it waits for is there. Assumed.
WAIT_CYCLES = 25

#: Seconds by which each kernel lengthens a stream that never runs dry. Assumed.
LAUNCH_SECONDS = 2e-6


@dataclass(frozen=True)
class Prediction:
    """``seconds`` of a call, and what most of them go to: ``"tensor cores"``, ``"issue"`` (instructions),
    ``"shared memory"``, ``"L2"``, ``"latency"`` (of one warp's chain or of loads), ``"ends"`` (pipeline fill,
    epilogue, adding up), ``"memory"`` or ``"launch"``. ``useful``: seconds of the tensor cores, or of the float32
    units for ieee, if they did nothing but this product at their peak on all multiprocessors."""

    seconds: float
    bound: str
    useful: float


@lru_cache(maxsize=64)
def family(device: Device) -> Family:
    """The newest known family that is not newer than the device: a GPU of tomorrow is served too."""
    known = [c for c in FAMILIES if c <= device.capability]
    return FAMILIES[max(known, default=(8, 0))]


def table_part(device: Device) -> str:
    """The part of the tile table that serves a device: Hopper has one for compilers that cannot be trusted."""
    architecture = family(device).architecture
    return f"{architecture} shared" if device.has_wgmma and not device.weight_left else architecture


def _clock(device: Device) -> float:
    """A reported clock is the highest one, which tensor cores at work do not reach: the data sheet's bounds it."""
    stated = family(device).clock_hz
    return min(device.clock_hz or stated, stated)


def fma_per_cycle(kind: Arithmetic, device: Device) -> float:
    """Multiply-adds a cycle of one multiprocessor."""
    if kind == "ieee":
        return 64.0 if family(device).architecture == "sm_80" else 128.0
    half = family(device).half_fma
    return half if kind == "half" else half / 2


def peak_flops(kind: Arithmetic, device: Device) -> float:
    """Flops a second of the whole GPU."""
    return 2 * fma_per_cycle(kind, device) * device.multiprocessors * _clock(device)


def resident(tile: Tile, device: Device) -> int:
    """Blocks of this tile that one multiprocessor holds at once, at least 1."""
    threads = 32 * tile.num_warps
    registers = math.ceil(tile.registers / 8) * 8 * threads
    # a block takes 1 KiB of shared memory for the system, which the opt-in limit leaves out once
    shared = (device.shared_memory + 1024) // (tile.shared + 1024)
    blocks = min(REGISTERS // registers, shared, family(device).threads // threads, RESIDENT_BLOCKS)
    if tile.tensor_columns:
        blocks = min(blocks, TENSOR_COLUMNS // tile.tensor_columns)
    return max(1, blocks)


@dataclass(frozen=True)
class _Work:
    """A launch, as the multiprocessor sees it. Bytes are of one block; ``memory_bytes`` of all.

    ``in_step``: a block's warps all wait for its products before the next step, as they do for W' in shared memory.
    """

    programs: int
    steps: int
    step_fma: int
    step_bytes: int
    end_bytes: int
    memory_bytes: int
    in_step: bool = False


def _busiest(tile: Tile, work: _Work, kind: Arithmetic, device: Device) -> tuple[float, float, str]:
    """Cycles in the loop and outside of it on the busiest multiprocessor, and what binds its loop."""
    tensor = 0.0 if kind == "ieee" else work.step_fma / fma_per_cycle(kind, device)
    rates = {
        "tensor cores": tensor,
        "issue": tile.slots * tile.num_warps / SCHEDULERS,
        "shared memory": tile.shared_bytes / SHARED_BYTES_PER_CYCLE,
        "L2": work.step_bytes / L2_BYTES_PER_CYCLE,
    }
    busy, name = max((cycles, name) for name, cycles in rates.items())
    # a warp's own chain: its instructions, its waits, and its share of the products, or all that it waits for
    products = tensor if work.in_step else tensor * SCHEDULERS / tile.num_warps
    chain = tile.slots * CYCLES_PER_INSTRUCTION + tile.waits * WAIT_CYCLES + products
    chain = max(chain, MEMORY_LATENCY / (tile.num_stages - 1))
    outside = tile.outside * max(CYCLES_PER_INSTRUCTION, tile.num_warps / SCHEDULERS)
    end = 2 * MEMORY_LATENCY + outside + work.end_bytes / L2_BYTES_PER_CYCLE

    def step(blocks: int) -> float:
        return max(blocks * busy, chain)

    blocks = resident(tile, device)
    full, rest = divmod(math.ceil(work.programs / device.multiprocessors), blocks)
    loop = work.steps * (full * step(blocks) + (step(rest) if rest else 0.0))
    most = blocks if full else rest
    return loop, end * (full + (1 if rest else 0)), name if most * busy >= chain else "latency"


def _predict(
    tile: Tile, work: _Work, kind: Arithmetic, device: Device, launches: int, after: float, fma: int
) -> Prediction:
    """``after``: seconds of work of the second kernel, besides its launch; ``fma``: of the product asked for."""
    clock, whole = _clock(device), family(device)
    loop, ends, name = _busiest(tile, work, kind, device)
    memory = work.memory_bytes / (device.memory_bandwidth or whole.memory_bandwidth)
    running = (loop + ends) / clock
    parts = {name: loop / clock, "ends": ends / clock + after, "launch": launches * LAUNCH_SECONDS}
    bound = "memory" if memory > running else max(parts, key=parts.__getitem__)
    seconds = max(running, memory) + after + launches * LAUNCH_SECONDS
    return Prediction(seconds, bound, 2 * fma / peak_flops(kind, device))


def _from_l2(size: int, device: Device) -> float:
    """Seconds in which all multiprocessors together move ``size`` bytes that lie in L2."""
    return size / (L2_BYTES_PER_CYCLE * device.multiprocessors * _clock(device))


def copy_seconds(size: int, device: Device) -> float:
    """Seconds of a kernel of its own that reads and writes ``size`` bytes."""
    return 2 * size / (device.memory_bandwidth or family(device).memory_bandwidth) + LAUNCH_SECONDS


def _weight_passes(weight_bytes: int, waves: int, device: Device) -> int:
    """How often W comes from memory: once if half the L2 holds it, otherwise with each wave."""
    return 1 if weight_bytes <= (device.l2_bytes or family(device).l2_bytes) // 2 else max(1, waves)


def product_steps(kernel: Product, tile: Tile, n: int, k: int, groups: int) -> int:
    """Steps of the sum behind one output tile: grad_input walks the groups one after another."""
    if kernel == "forward":
        return math.ceil(k / tile.block_k)
    return groups * math.ceil(n // groups / tile.block_n)


def product_programs(kernel: Product, tile: Tile, m: int, n: int, k: int, groups: int) -> int:
    """Output tiles."""
    bands = math.ceil(m / tile.block_m)
    if kernel == "forward":
        return bands * groups * math.ceil(n // groups / tile.block_n)
    return bands * math.ceil(k / tile.block_k)


def predict_product(
    kernel: Product,
    tile: Tile,
    splits: int,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    x_size: int,
    weight_size: int,
    device: Device,
) -> Prediction:
    """forward or grad_input of x ``[m, k]``, W ``[n, k]``; sizes of an element in bytes."""
    programs = product_programs(kernel, tile, m, n, k, groups)
    steps = product_steps(kernel, tile, n, k, groups)
    in_width, out_width, block_out, depth = n, k, tile.block_k, tile.block_n
    if kernel == "forward":
        in_width, out_width, block_out, depth = k, n, tile.block_n, tile.block_k
    step_bytes = depth * (tile.block_m * x_size + block_out * weight_size)
    out_size = 4 if splits > 1 else x_size
    waves = math.ceil(programs / (resident(tile, device) * device.multiprocessors))
    weight_bytes = n * k * weight_size
    work = _Work(
        programs=programs * splits,
        steps=math.ceil(steps / splits),
        step_fma=tile.block_m * block_out * depth,
        step_bytes=step_bytes,
        end_bytes=tile.block_m * block_out * out_size,
        memory_bytes=m * (in_width + out_width) * x_size + weight_bytes * _weight_passes(weight_bytes, waves, device),
        # wgmma takes 64 tokens at least on that side; fewer go by mma.sync, W' in registers
        in_step=device.has_wgmma and not device.weight_left and tile.block_m >= 64,
    )
    after = 0.0
    if splits > 1:
        # the second kernel adds one partial after another, each as late as a load from L2
        cycles = MEMORY_LATENCY + splits * L2_LATENCY
        after = _from_l2(m * out_width * (4 * splits + x_size), device) + cycles / _clock(device)
    return _predict(tile, work, kind, device, 2 if splits > 1 else 1, after, m * n * k)


def scales_partial_bytes(tile: Tile, n: int, k: int, groups: int) -> int:
    """Partial sums of du, dv and df that one split of grad_scales writes."""
    n_tiles = groups * math.ceil(n // groups / tile.block_n)
    return 4 * (math.ceil(k / tile.block_k) * n + n_tiles * k + n)


def predict_scales(
    tile: Tile,
    split_tokens: int,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    x_size: int,
    weight_size: int,
    device: Device,
) -> Prediction:
    """grad_scales of dy ``[m, n]`` and x ``[m, k]`` with ``split_tokens`` tokens a split, df included.

    A program that adds up dy for df is taken to last as long as one of the product.
    """
    splits = math.ceil(m / split_tokens)
    n_tiles = groups * math.ceil(n // groups / tile.block_n)
    k_tiles = math.ceil(k / tile.block_k)
    partial = scales_partial_bytes(tile, n, k, groups) * splits
    waves = math.ceil(n_tiles * (k_tiles + 1) * splits / (resident(tile, device) * device.multiprocessors))
    weight_bytes = n * k * weight_size
    work = _Work(
        programs=n_tiles * (k_tiles + 1) * splits,
        steps=math.ceil(split_tokens / tile.block_m),
        step_fma=tile.block_m * tile.block_n * tile.block_k,
        step_bytes=tile.block_m * (tile.block_n + tile.block_k) * x_size,
        end_bytes=tile.block_n * tile.block_k * weight_size,
        memory_bytes=m * (n + k) * x_size + weight_bytes * _weight_passes(weight_bytes, waves, device),
    )
    # the second kernel walks its rows 16 at a time, each round as long as a load
    rounds = math.ceil(splits * max(k_tiles, math.ceil(n_tiles / groups)) / 16)
    cycles = MEMORY_LATENCY + rounds * L2_LATENCY
    after = _from_l2(partial, device) + cycles / _clock(device)
    return _predict(tile, work, kind, device, 2, after, m * n * k)


def stage_bytes(kernel: Kernel, tile: Tile, x_size: int, weight_size: int) -> int:
    """Shared memory of one pipeline stage: the two tiles of a step."""
    if kernel == "forward":
        return tile.block_k * (tile.block_m * x_size + tile.block_n * weight_size)
    if kernel == "grad_input":
        return tile.block_n * (tile.block_m * x_size + tile.block_k * weight_size)
    return tile.block_m * (tile.block_n + tile.block_k) * x_size
