"""What ptxas made of the loops for sm_80: no element copies in the loop of whole tiles, and no more than it needs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda_host.machine import PASSES, SOURCES
from tests.sass import disassembled, disassembler

#: Pass -> most instructions in the loop of whole tiles, the large one and the small one: what nvcc 13.0 made of it and
#: 20 more. grad_input's hold the change to another group too, which most steps jump over, without its loads of v.
MOST = {"forward": (261 + 20, 133 + 20), "grad_input": (287 + 20, 157 + 20), "grad_scales": (132 + 20, 59 + 20)}


def _loops(lines: list[str]) -> list[list[str]]:
    """Of a kernel, those around products, without their labels."""
    places = {line: place for place, line in enumerate(lines) if line.startswith(".L")}
    found = []
    for end, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and places.get(target[1], end) < end:
            body = [x for x in lines[places[target[1]] : end + 1] if not x.startswith(".L")]
            if any("HMMA" in x for x in body):
                found.append(body)
    return found


@pytest.fixture(scope="module", params=PASSES)
def compiled(request, tmp_path_factory) -> tuple[str, dict[str, list[str]]]:
    """A pass, and the instructions and labels of each of its kernels for bfloat16 x and W."""
    tool = disassembler()
    if shutil.which("nvcc") is None or tool is None:
        pytest.skip("needs nvcc and nvdisasm")
    cubin = tmp_path_factory.mktemp("sass") / f"{request.param}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-arch=sm_80", "-cubin"]
    subprocess.run([*command, str(Path(SOURCES) / f"{request.param}.cu"), "-o", str(cubin)], check=True)
    kernels = disassembled(cubin, tool)
    # in mangled names S3_ is bf16 once more, and grad_scales has no dtype of W
    pattern = r"4bf16EEES\d_NS" if request.param != "grad_scales" else r"4bf16EEENS"
    return request.param, {name: lines for name, lines in kernels.items() if re.search(pattern, name)}


@pytest.mark.slow
def test_the_loop_of_whole_tiles_is_lean(compiled):
    name, kernels = compiled
    assert len(kernels) == 2
    for kernel, lines in kernels.items():
        whole = min(_loops(lines), key=len)
        products = sum("HMMA.16816" in x for x in whole)
        large = "Li128ELi128E" in kernel
        assert products == (64 if large else 16)
        copies = sum("LDGSTS" in x for x in whole)
        # two operands of a tile and, where W is rescaled, its depth's scales
        assert copies == (8 if large else 4) + (name != "grad_scales")
        # besides those, global memory is read for the v of another group alone, and nothing is stored
        loads = sum(bool(re.search(r"\bLDG\b|\bLDG\.", x)) for x in whole)
        assert loads == 0 or name == "grad_input"
        assert not any(re.search(r"\bSTS\b|\bSTG\b|\bSTL\b|\bLDL\b", x) for x in whole)
        assert len(whole) - loads <= MOST[name][not large]
