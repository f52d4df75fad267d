"""What ptxas made of the Hopper kernels: products that overlap, operands left alone, nothing spilled."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rlrr_kernels.backends.library import FOLDER
from tests.cuda_host.machine import SOURCES
from tests.hazards import hazards
from tests.sass import disassembled, disassembler

COMMAND = (
    "nvcc",
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xptxas",
    "-v",
    "-cubin",
)

#: Columns of a product -> cycles that the tensor cores take for a step of both warpgroups: 2 x 4 products.
STEP_CYCLES = {256: 1024, 128: 512}


@pytest.fixture(scope="module", params=["forward", "grad_input", "grad_scales"])
def compiled(request, tmp_path_factory) -> tuple[str, str, dict[str, list[str]]]:
    """A pass, what ptxas said of it, and the instructions and labels of each of its kernels."""
    tool = disassembler()
    if shutil.which("nvcc") is None or tool is None:
        pytest.skip("needs nvcc and nvdisasm")
    cubin = tmp_path_factory.mktemp("sass") / f"{request.param}.cubin"
    source = SOURCES / "hopper" / f"{request.param}.cu"
    log = subprocess.run([*COMMAND, str(source), "-o", str(cubin)], check=True, capture_output=True, text=True).stderr
    kernels = disassembled(cubin, tool)
    return request.param, log, {name: lines for name, lines in kernels.items() if any("HGMMA" in x for x in lines)}


def _step(lines: list[str]) -> list[str]:
    """The shortest loop around an HGMMA."""
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"BRA `\((\.L_x_\d+)\)", line)
        if target and target[1] in lines[:end]:
            body = lines[lines.index(target[1]) : end + 1]
            if any("HGMMA" in x for x in body):
                loops.append([x for x in body if not x.startswith(".L")])
    return min(loops, key=len)


def _columns(lines: list[str]) -> int:
    """Of a kernel's products."""
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
def test_nothing_is_spilled_or_serialised(compiled):
    name, log, kernels = compiled
    assert "serialized" not in log
    assert not re.search(r"C75\d\d", log)
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", log)) == {"0"}
    widths = [_columns(lines) for lines in kernels.values()]
    assert sorted(widths) == ([256, 256] if name == "grad_scales" else [128, 128, 256, 256])  # float16 and bfloat16
    for lines in kernels.values():
        assert any("UTMALDG.2D" in x for x in lines)
        assert any("USETMAXREG" in x for x in lines)


@pytest.mark.slow
def test_a_step_fits_under_its_products(compiled):
    name, _, kernels = compiled
    for lines in kernels.values():
        step = _step(lines)
        products = [x for x in step if "HGMMA" in x]
        assert len(products) == 4
        from_registers = [x for x in products if re.search(r"R\d+, R\d+, gdesc", x)]
        assert len(from_registers) == (0 if name == "grad_scales" else 4)
        # every wait lets some run on
        waits = [int(x, 16) for x in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", "\n".join(step))]
        assert waits
        assert min(waits) >= 3
        # two warps a scheduler; a third of the step is only there for a new segment
        cycles = STEP_CYCLES[_columns(step)]
        assert 2 * len(step) < (cycles / 2 if cycles == 1024 else 0.8 * cycles)


@pytest.mark.slow
def test_no_register_of_a_running_product_is_touched(tmp_path):
    """In the library as it is built, on every path."""
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
