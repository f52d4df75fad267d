"""The machine code that ptxas makes of the kernels: lean loops on sm_80, and overlapping products on sm_90a."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rlrr_kernels.backends.library import FOLDER
from tests.cuda_host.machine import PASSES, SOURCES
from tests.hazards import hazards
from tests.sass import disassembled, disassembler

#: Pass -> most instructions in the loop of whole tiles, the large one and the small one: what nvcc 13.0 made of it and
#: 20 more. grad_input's loop includes the change to another group, which most steps skip, without its loads of v.
MOST = {"forward": (261 + 20, 133 + 20), "grad_input": (287 + 20, 157 + 20), "grad_scales": (132 + 20, 59 + 20)}
#: Columns of a product -> cycles that the tensor cores take for a step of both warpgroups: 2 x 4 products.
STEP_CYCLES = {256: 1024, 128: 512}

Kernels = dict[str, list[str]]


def _compile(source: Path, folder: Path, *options: str) -> tuple[str, Kernels]:
    """Return the output of ptxas, and the instructions and labels of each kernel of a source file."""
    tool = disassembler()
    if shutil.which("nvcc") is None or tool is None:
        pytest.skip("needs nvcc and nvdisasm")
    cubin = folder / f"{source.stem}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", *options, "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, str(source), "-o", str(cubin)], check=True, capture_output=True, text=True)
    return done.stderr, disassembled(cubin, tool)


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


@pytest.fixture(scope="module", params=PASSES)
def compiled(request, tmp_path_factory) -> tuple[str, Kernels]:
    """A pass, and its kernels for bfloat16 x and W on sm_80."""
    _, kernels = _compile(SOURCES / f"{request.param}.cu", tmp_path_factory.mktemp("sass"), "-arch=sm_80")
    # in mangled names S3_ is bf16 once more, and grad_scales has no dtype of W
    pattern = r"4bf16EEES\d_NS" if request.param != "grad_scales" else r"4bf16EEENS"
    return request.param, {name: lines for name, lines in kernels.items() if re.search(pattern, name)}


@pytest.fixture(scope="module", params=PASSES)
def hopper_compiled(request, tmp_path_factory) -> tuple[str, str, Kernels]:
    """A pass, the output of ptxas, and its Hopper kernels."""
    source, target = SOURCES / "hopper" / f"{request.param}.cu", "-gencode=arch=compute_90a,code=sm_90a"
    log, kernels = _compile(source, tmp_path_factory.mktemp("sass"), target)
    return request.param, log, {name: lines for name, lines in kernels.items() if any("HGMMA" in x for x in lines)}


@pytest.mark.slow
def test_the_loop_of_whole_tiles_is_lean(compiled):
    name, kernels = compiled
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


@pytest.mark.slow
def test_nothing_is_spilled_or_serialised(hopper_compiled):
    name, log, kernels = hopper_compiled
    assert "serialized" not in log
    assert not re.search(r"C75\d\d", log)
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", log)) == {"0"}
    widths = [_columns(lines) for lines in kernels.values()]
    assert sorted(widths) == ([256, 256] if name == "grad_scales" else [128, 128, 256, 256])  # float16 and bfloat16
    for lines in kernels.values():
        assert any("UTMALDG.2D" in x for x in lines)
        assert any("USETMAXREG" in x for x in lines)


@pytest.mark.slow
def test_a_step_fits_under_its_products(hopper_compiled):
    name, _, kernels = hopper_compiled
    for lines in kernels.values():
        step = min(_loops(lines, "HGMMA"), key=len)
        products = [x for x in step if "HGMMA" in x]
        assert len(products) == 4
        from_registers = [x for x in products if re.search(r"R\d+, R\d+, gdesc", x)]
        assert len(from_registers) == (0 if name == "grad_scales" else 4)
        # each wait lets products overlap
        waits = [int(x, 16) for x in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", "\n".join(step))]
        assert waits
        assert min(waits) >= 3
        # two warps for each scheduler; a third of the step is only needed for a new segment
        cycles = STEP_CYCLES[_columns(step)]
        assert 2 * len(step) < (cycles / 2 if cycles == 1024 else 0.8 * cycles)


@pytest.mark.slow
def test_no_register_of_a_running_product_is_touched(tmp_path):
    """Checked in the built library, on every path."""
    library, tool = FOLDER / "librlrr_cuda.so", disassembler()
    if not library.exists() or tool is None:
        pytest.skip("needs the CUDA library, and nvdisasm")
    subprocess.run(
        [Path(tool).with_name("cuobjdump"), "-xelf", "sm_90a", str(library)],
        check=True,
        cwd=tmp_path,
        capture_output=True,
    )
    cubins = list(tmp_path.glob("*.cubin"))
    if not cubins:
        pytest.skip("this cuobjdump is older than the nvcc that built the library, and finds nothing in it")
    kernels = [item for cubin in cubins for item in disassembled(cubin, tool).items()]
    found = {name: hazards(lines) for name, lines in kernels if any("HGMMA" in line for line in lines)}
    assert len(found) == 10
    assert not any(found.values()), found
