"""The step under PEFT: all methods are measured, and accelerated HiRA's gradients are compared with PEFT's."""

import types

import pytest

pytest.importorskip("peft", minversion="0.20")

from benchmarks import peft_step

SMALL = ["--hidden", "64", "--layers", "1", "--batch", "2", "16", "--rounds", "2", "--ranks", "4"]


@pytest.mark.slow
def test_a_table_of_all_methods_and_dtypes(capsys):
    assert peft_step.main(SMALL) == 0
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith(("| f", "| b"))]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [dtype, "4", method] for dtype in ("float32", "bfloat16") for method in peft_step.METHODS
    ]


@pytest.mark.slow
def test_wrong_gradients_are_not_timed(monkeypatch):
    def accelerate_wrongly(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(1.1)
        return types.SimpleNamespace(left={})

    monkeypatch.setattr(peft_step, "accelerate_hira", accelerate_wrongly)
    with pytest.raises(RuntimeError, match="gradients differ from PEFT's by"):
        peft_step.main(SMALL)
