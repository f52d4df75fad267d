"""``auto`` never takes a backend that failed its check here; a backend that is named serves all the same."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

from rlrr_kernels import backend_for, rescaled_linear, use_backend
from rlrr_kernels.__main__ import info
from rlrr_kernels.backends import choice, reference, triton, verdicts
from rlrr_kernels.backends.triton import launch
from tests.check.conftest import findings, keep
from tests.oracle import make_problem, require
from tests.tune.entries import entry

X = torch.zeros(2, 4)


@pytest.mark.parametrize("wrong", verdicts.PASSES)
def test_auto_leaves_out_what_failed_and_says_so(file, wrong):
    require("cpu")
    keep(file, findings(wrong=wrong))
    words = rf"'cpu' is not available, 'panels' serves: failed its check on this device: {wrong}: y: not finite"
    with pytest.warns(UserWarning, match=words):
        chosen, why = choice.explain(X, X)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert backend_for(X.bfloat16(), X.bfloat16()) == "panels"
    assert (chosen, why) == ("panels", f"cpu failed its check on this device: {wrong}: y: not finite")


def test_a_failed_backend_is_not_loaded(file, monkeypatch):
    """Loading its library may end the process."""
    keep(file, findings(wrong="forward"))
    monkeypatch.setattr(choice, "_loaded", {"panels": choice.load("panels"), "cpu": "loaded"})
    monkeypatch.setattr(
        choice, "load", lambda name: choice._loaded.pop(name) if name == "cpu" else choice._loaded[name]
    )
    with pytest.warns(UserWarning, match="'panels' serves"):
        assert backend_for(X, X) == "panels"
    assert choice._loaded["cpu"] == "loaded"


def test_info_does_not_load_a_failed_backend(file, monkeypatch):
    keep(file, findings(wrong="forward"))
    loaded, load = [], choice.load
    monkeypatch.setattr(choice, "load", lambda name: loaded.append(name) or load(name))
    with pytest.warns(UserWarning, match="'panels' serves"):
        report = list(info())
    assert "cpu" not in loaded
    assert "  cpu        not loaded: it failed its check on this device: forward: y: not finite" in report
    assert "    cpu          failed: forward: y: not finite" in report


def test_what_is_proven_or_unchecked_serves(file):
    require("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.explain(X, X) == ("cpu", "default for cpu")
        keep(file, findings())
        assert choice.explain(X, X) == ("cpu", "default for cpu")


def test_a_named_backend_is_used_even_if_it_failed(file):
    require("cpu")
    keep(file, findings(wrong="forward"))
    with use_backend("cpu"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.explain(X, X) == ("cpu", "asked for")


def test_a_failed_backend_is_not_used_even_if_it_was_measured_fastest(file, monkeypatch):
    require("cpu")
    monkeypatch.setattr(choice.tuned, "entries", lambda device: (entry(1, 10, "cpu", layer=None),))
    keep(file, findings(wrong="grad_scales"))
    with pytest.warns(UserWarning, match="'panels' serves"):
        assert backend_for(X, X) == "panels"


def test_cuda_is_judged_by_the_kernels_that_it_uses(monkeypatch):
    asked = []
    monkeypatch.setattr(verdicts, "failure", lambda subject, device, passes: asked.append(subject))
    for hopper in ("0", "1"):
        choice.failed.cache_clear()
        monkeypatch.setenv("RLRR_CUDA_HOPPER", hopper)
        choice.failed("cuda", torch.device("cuda:0"))
    choice.failed.cache_clear()
    assert asked == ["cuda", "cuda-hopper"]


def test_the_record_is_read_once_and_no_call_asks_again(file, monkeypatch):
    require("cpu")
    keep(file, findings())
    read, asked = [], []
    monkeypatch.setattr(verdicts.cache, "read", lambda path, layout: read.append(path) or [])
    failure = verdicts.failure
    monkeypatch.setattr(verdicts, "failure", lambda *a: asked.append(a) or failure(*a))
    p = make_problem(3, 4, 5)
    for _ in range(3):
        rescaled_linear(*p.forward_args)
    threads = [threading.Thread(target=rescaled_linear, args=p.forward_args) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (read, len(asked)) == ([file], 1)


def test_it_is_chosen_behind_a_compiler_too(file):
    require("cpu")
    keep(file, findings(wrong="forward"))
    p = make_problem(3, 4, 5)
    served = []
    forward = choice.load("panels").forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice.load("panels"), "forward", lambda *a: served.append(1) or forward(*a))
        with pytest.warns(UserWarning, match="'panels' serves"):
            torch.compile(rescaled_linear, fullgraph=True, backend="eager")(*p.forward_args)
    assert served == [1]


class OnGPU:
    """Stands for a tensor of a GPU that is not here."""

    device = torch.device("cuda:0")
    shape = (2, 8)

    def numel(self):
        return 16


@pytest.mark.parametrize("wrong", [None, "forward", "layer_norm"])
def test_layer_norms_kernels_are_judged_by_their_own_pass(file, monkeypatch, wrong):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(launch, "unsupported", lambda x, weight, rank=1: None)
    keep(file, findings("triton", wrong, OnGPU.device))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert choice.module_for_layer_norm(OnGPU()) is (reference if wrong == "layer_norm" else triton)
    assert len(said) == (wrong == "layer_norm")
    assert (choice.failed("triton", OnGPU.device) is None) == (wrong != "forward")
    with use_backend("triton"):
        assert choice.module_for_layer_norm(OnGPU()) is triton


@pytest.mark.parametrize("wrong", [None, "grad_input"])
def test_where_gluon_failed_triton_serves(file, monkeypatch, wrong):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(choice, "_plans", {})
    monkeypatch.setattr(choice.tuned, "entries", lambda device: ())
    for name in ("gluon", "triton"):
        monkeypatch.setattr(choice.load(name), "unsupported", lambda x, weight, rank=1: None)
    monkeypatch.setattr(OnGPU, "dtype", torch.bfloat16, raising=False)
    keep(file, findings("gluon", wrong, OnGPU.device))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert backend_for(OnGPU(), OnGPU()) == ("triton" if wrong else "gluon")
    assert ["'gluon' is not available, 'triton' serves" in str(warning.message) for warning in said] == [True] * bool(
        wrong
    )
