"""The machine code of the built library: no spills, lean loops on sm_80, and overlapping products on sm_90a."""

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from rlrr_kernels.backends.library import FOLDER
from tests.cuda_host.machine import PASSES, SOURCES
from tests.hazards import hazards
from tests.sass import disassembled, disassembler

#: Pass -> most instructions in the loop of whole tiles, the large one and the small one: what nvcc 13.0 made of it and
#: 20 more. grad_input's loop includes the change to another group, which most steps skip, without its loads of v.
MOST = {"forward": (261 + 20, 133 + 20), "grad_input": (287 + 20, 157 + 20), "grad_scales": (132 + 20, 59 + 20)}
#: Pass -> its Hopper kernels, in mangled names: ``Weight`` is rows, then columns.
HOPPER = {
    "forward": "product_kernel.*6WeightE0",
    "grad_input": "product_kernel.*6WeightE1",
    "grad_scales": "gram_kernel",
}
#: Columns of a product -> cycles that the tensor cores take for a step of both warpgroups: 2 x 4 products.
STEP_CYCLES = {256: 1024, 128: 512}

Kernels = dict[str, list[str]]


def _library() -> tuple[Path, Path]:
    """Return the built library and the folder of CUDA's tools."""
    library, tool = FOLDER / "librlrr_cuda.so", disassembler()
    if not library.exists() or tool is None:
        pytest.skip("needs the CUDA library, and nvdisasm")
    return library, Path(tool).parent


@functools.cache
def _kernels(arch: str) -> Kernels:
    """Return the instructions and labels of each kernel that the built library has for an architecture."""
    library, tools = _library()
    with tempfile.TemporaryDirectory() as folder:
        extract = [tools / "cuobjdump", "-xelf", arch, library]
        subprocess.run(extract, check=True, cwd=folder, capture_output=True)
        cubins = [disassembled(cubin, str(tools / "nvdisasm")) for cubin in Path(folder).glob("*.cubin")]
    if not cubins:
        pytest.skip(f"there is no {arch} in the library, or cuobjdump is older than the nvcc that built it")
    return {name: lines for kernels in cubins for name, lines in kernels.items()}


def _loops(lines: list[str], product: str) -> list[list[str]]:
    """Return the loops of a kernel that hold a product, without labels."""
    places = {line: place for place, line in enumerate(lines) if line.startswith(".L")}
    found = []
    for end, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and places.get(target[1], end) < end:
            body = [x for x in lines[places[target[1]] : end + 1] if not x.startswith(".L")]
            if any(product in x for x in body):
                found.append(body)
    return found


@pytest.fixture(params=PASSES)
def ampere(request) -> tuple[str, Kernels]:
    """A pass, and its kernels for bfloat16 x and W on sm_80."""
    # in mangled names S3_ is bf16 once more, and grad_scales has no dtype of W
    pattern = r"4bf16EEES\d_NS" if request.param != "grad_scales" else r"4bf16EEENS"
    found = re.compile(rf"\d{request.param}_kernel.*{pattern}")
    return request.param, {name: lines for name, lines in _kernels("sm_80").items() if found.search(name)}


@pytest.fixture(params=PASSES)
def hopper(request) -> tuple[str, Kernels]:
    """A pass, and its Hopper kernels."""
    found = re.compile(HOPPER[request.param])
    return request.param, {name: lines for name, lines in _kernels("sm_90a").items() if found.search(name)}


@pytest.mark.slow
def test_the_loop_of_whole_tiles_is_lean(ampere):
    name, kernels = ampere
    assert len(kernels) == 2
    for kernel, lines in kernels.items():
        whole = min(_loops(lines, "HMMA"), key=len)
        products = sum("HMMA.16816" in x for x in whole)
        large = "Li128ELi128E" in kernel
        assert products == (64 if large else 16)
        copies = sum("LDGSTS" in x for x in whole)
        # two operands of a tile and, if W is rescaled, the scales of its depth
        assert copies == (8 if large else 4) + (name != "grad_scales")
        # otherwise global memory is only read for v of another group, and nothing is stored
        loads = sum(bool(re.search(r"\bLDG\b|\bLDG\.", x)) for x in whole)
        assert loads == 0 or name == "grad_input"
        assert not any(re.search(r"\bSTS\b|\bSTG\b|\bSTL\b|\bLDL\b", x) for x in whole)
        assert len(whole) - loads <= MOST[name][not large]


def _columns(lines: list[str]) -> int:
    """Return the number of columns of the products of a kernel."""
    found = {int(columns) for columns in re.findall(r"HGMMA\.64x(\d+)x16", "\n".join(lines))}
    assert len(found) == 1
    return found.pop()


WAITING = """
#include "hopper/warpgroups.cuh"
RLRR_HOPPER_KERNEL waiting() {
  auto& ring = *reinterpret_cast<rlrr::hopper::Ring<2>*>(rlrr::ptx::swizzled_shared_memory());
  rlrr::hopper::Place<2>().await(ring);
}
"""


@pytest.mark.parametrize("debug", [False, True])
def test_a_debug_build_says_what_waits_for_ever_and_ends_the_kernel(tmp_path, debug):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    (tmp_path / "waiting.cu").write_text(WAITING)
    command = ["nvcc", "-std=c++20", "-arch=compute_90a", "-ptx", f"-I{SOURCES}", "-o", "waiting.ptx", "waiting.cu"]
    subprocess.run(command + ["-DRLRR_DEBUG_WAITS"] * debug, check=True, cwd=tmp_path)
    ptx = (tmp_path / "waiting.ptx").read_text()
    texts = [bytes(map(int, found.split(","))) for found in re.findall(r"\.b8 \S+\[\d+\] = \{([\d, ]+)\}", ptx)]
    assert "mbarrier.try_wait" in ptx
    assert ("%clock64" in ptx, "trap;" in ptx, "vprintf" in ptx) == (debug, debug, debug)
    assert (b"full" in texts) is debug
    assert any(b"block %d, warp %d waits for ever: phase %u of %s[%d]" in text for text in texts) is debug


def test_no_kernel_has_a_stack():
    """So none spills, whatever the architecture."""
    library, tools = _library()
    usage = [tools / "cuobjdump", "--dump-resource-usage", library]
    found = subprocess.run(usage, check=True, capture_output=True, text=True).stdout
    kernels = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", found)
    if not kernels:
        pytest.skip("cuobjdump is older than the nvcc that built the library")
    for kernel in (*(f"{name}_kernel" for name in PASSES), "product_kernel", "gram_kernel"):
        assert any(kernel in name for name, *_ in kernels), kernel
    assert not [name for name, *bytes_each in kernels if bytes_each != ["0", "0"]]


@pytest.mark.slow
def test_each_pass_has_its_products_and_copies(hopper):
    name, kernels = hopper
    widths = [_columns(lines) for lines in kernels.values()]
    assert sorted(widths) == ([256, 256] if name == "grad_scales" else [128, 128, 256, 256])  # float16 and bfloat16
    for lines in kernels.values():
        assert any("UTMALDG.2D" in x for x in lines)
        assert any("USETMAXREG" in x for x in lines)


@pytest.mark.slow
def test_a_step_fits_under_its_products(hopper):
    name, kernels = hopper
    for lines in kernels.values():
        step = min(_loops(lines, "HGMMA"), key=len)
        products = [x for x in step if "HGMMA" in x]
        assert len(products) == 4
        from_registers = [x for x in products if re.search(r"R\d+, R\d+, gdesc", x)]
        assert len(from_registers) == (0 if name == "grad_scales" else 4)
        # each wait lets products overlap: where ptxas serialises them, it waits for each
        waits = [int(x, 16) for x in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", "\n".join(step))]
        assert waits
        assert min(waits) >= 3
        # two warps for each scheduler; a third of the step is only needed for a new segment
        cycles = STEP_CYCLES[_columns(step)]
        assert 2 * len(step) < (cycles / 2 if cycles == 1024 else 0.8 * cycles)


@pytest.mark.slow
def test_no_register_of_a_running_product_is_touched():
    """On every path."""
    found = {name: hazards(lines) for name, lines in _kernels("sm_90a").items() if any("HGMMA" in x for x in lines)}
    assert len(found) == 10
    assert not any(found.values()), found
