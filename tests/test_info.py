"""``python -m rlrr_kernels info`` prints versions, backends, and which backend serves what."""

import pytest
import torch

from rlrr_kernels import use_backend
from rlrr_kernels.__main__ import info, main
from rlrr_kernels.backends import BACKENDS, choice
from tests.oracle import require


def test_it_names_versions_backends_and_choices(capsys):
    require("cpu")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    words = [line.split() for line in printed.splitlines()]
    assert ["rlrr_kernels", "0.1.0"] in words
    assert torch.__version__ in printed
    for backend in BACKENDS:
        assert any(w[:1] == [backend] and w[1].rstrip(":") in ("available", "not") for w in words), backend
    assert "    measured   reference  forward, float64, any N and K, 1024 and more tokens" in printed
    served = {w[0]: w[1] for w in words if w and w[0] in ("float32", "bfloat16", "float16", "float64")}
    if not torch.cuda.is_available():
        assert served == {"float32": "cpu", "bfloat16": "cpu", "float16": "panels", "float64": "cpu"}


def test_it_gives_the_reason_where_a_backend_is_missing(monkeypatch):
    monkeypatch.setitem(choice._loaded, "cuda", "it cannot be imported: no such file")
    monkeypatch.setitem(choice._loaded, "cpu", "it cannot be imported: not built")
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(choice, "_plans", {})
    with pytest.warns(UserWarning, match="'cpu' is not available, 'panels' serves"):
        report = "\n".join(info())
    assert "cuda       not available: it cannot be imported: no such file" in report
    assert "float32    panels     cpu cannot serve it" in report
    with use_backend("triton"):
        assert "float64    none       backend 'triton' cannot serve" in "\n".join(info())
