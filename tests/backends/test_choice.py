"""Which backend serves which tensors."""

import contextlib
import importlib
import math
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from rlrr_kernels import backend_for, rescaled_linear, use_backend
from rlrr_kernels.backends import choice, tuned
from rlrr_kernels.backends.triton import launch
from tests.oracle import device_of, make_problem, require
from tests.tune.entries import entry, file_of


def test_auto_serves_cpu_tensors_by_the_cpu_ops_and_what_they_refuse_by_panels():
    require("cpu")
    x = torch.zeros(2, 4)
    served = {dtype: backend_for(x.to(dtype), x.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    assert set(served.values()) == {"cpu"}
    assert backend_for(x.half(), x.half()) == "panels"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' cannot serve x torch.float16.* float32 and bfl"):
        backend_for(x.half(), x.half())


@pytest.mark.gpu
def test_auto_serves_gpu_tensors_by_gluon_or_triton_and_float64_by_panels(gpu):
    x = torch.zeros(2, 4, device=gpu)
    assert backend_for(x, x) == "triton"
    assert backend_for(x.half(), x.half()) == ("gluon" if torch.cuda.get_device_capability(gpu)[0] == 9 else "triton")
    assert backend_for(x.double(), x.double()) == "panels"


@pytest.fixture
def tensors():
    """A tensor that two backends can serve, the backend it gets by itself, and the other one."""
    x = torch.zeros(2, 4, device=device_of("triton"))
    own = backend_for(x, x)
    return x, own, "triton" if own != "triton" else "panels"


def test_use_backend_nests_and_ends_after_an_error_too(tensors):
    x, own, other = tensors
    with contextlib.suppress(KeyError), use_backend(other):
        assert backend_for(x, x) == other
        with use_backend("auto"):
            assert backend_for(x, x) == own
        assert backend_for(x, x) == other
        raise KeyError
    assert backend_for(x, x) == own


def test_environment_variable(tensors, monkeypatch):
    x, own, other = tensors
    monkeypatch.setenv("RLRR_BACKEND", other)
    assert backend_for(x, x) == other
    with use_backend(own):
        assert backend_for(x, x) == own
    with pytest.raises(ValueError, match="use_backend: unknown backend 'cudnn'"), use_backend("cudnn"):
        pass
    monkeypatch.setenv("RLRR_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"RLRR_BACKEND: unknown backend 'tritn', expected one of auto, cpu, gluon"):
        backend_for(x, x)


def test_a_named_backend_that_cannot_serve_is_an_error_not_a_silent_change():
    p = make_problem(3, 4, 5, dtype=torch.float64)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' cannot serve .*float64.*reference"):
        rescaled_linear(*p.forward_args)


def test_triton_gives_its_reason_for_refusing_cpu_tensors():
    with mock.patch.object(launch, "interpreting", return_value=False):
        assert "runs on NVIDIA GPUs" in launch.unsupported(torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is loaded, no warning was given, and no table was read."""
    monkeypatch.setattr(choice, "_loaded", {})
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(choice, "_plans", {})
    tuned.reload()
    yield monkeypatch
    tuned.reload()


def test_a_backend_that_cannot_be_imported_is_an_error_when_asked_for(fresh):
    """As on a platform for which Triton has no wheel."""
    fresh.setitem(sys.modules, "rlrr_kernels.backends.triton", None)
    x = torch.zeros(2, 4)
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot serve it cannot be imported"):
        backend_for(x, x)


def test_a_missing_library_gives_one_warning_with_the_remedy_and_panels_serve(fresh, tmp_path):
    from rlrr_kernels.backends import library

    fresh.setattr(library, "FOLDER", tmp_path)
    fresh.delitem(sys.modules, "rlrr_kernels.backends.cpu", raising=False)
    p = make_problem(3, 4, 5)
    with pytest.warns(UserWarning, match=r"'cpu' is not available, 'panels' serves: .*not built.*pip install") as said:
        assert backend_for(p.x, p.weight) == "panels"
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rescaled_linear(*p.forward_args)


def test_a_library_for_another_torch_is_an_error_with_the_remedy(fresh, tmp_path):
    from rlrr_kernels.backends import library

    (tmp_path / "librlrr_cpu.so").write_bytes(b"not a library")
    fresh.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(
        ImportError, match=rf"does not load with torch {torch.__version__[:4]}.*; reinstall from the source folder: pip"
    ):
        library.load("cpu", "a C++ compiler")


def test_importing_the_package_neither_loads_nor_warns():
    """A missing library is reported when a backend is needed, not at import."""
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "from rlrr_kernels.backends import library, choice\n"
        "library.load = lambda *a: 1 / 0\n"
        "import rlrr_kernels; assert choice._loaded == {}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def measured(fresh, tmp_path):
    """A function that writes entries to the user's table."""
    fresh.delenv("RLRR_TUNED", raising=False)
    fresh.setenv("RLRR_TUNED_FILE", str(tmp_path / "tuned.json"))
    return lambda *entries: file_of(tmp_path / "tuned.json", *entries)


def test_a_measured_backend_precedes_the_default_for_its_pass_shape_and_tokens(measured):
    require("cpu")
    narrow = {"dtype": torch.bfloat16, "weight_dtype": torch.bfloat16}
    measured(
        entry(2, 3, layer=(4, 5, 1), kernel="grad_input"),
        entry(2, 3, layer=(4, 5, 2)),
        entry(100, math.inf, layer=None, **narrow),
    )

    def served(m, kernel="forward", groups=2, dtype=torch.float32, n=4):
        x, w = torch.zeros(m, 5 if kernel == "forward" else n, dtype=dtype), torch.zeros(n, 5, dtype=dtype)
        return choice.explain(x, w, kernel, groups)

    best = ("reference", "measured fastest")
    own = ("cpu", "default for cpu")
    assert [served(m) for m in (1, 2, 3, 4)] == [own, best, best, own]
    assert [served(2, groups=1), served(2, n=6)] == [own, own]
    assert [served(2, kernel, 1) for kernel in ("grad_input", "grad_scales")] == [best, own]
    assert [served(m, dtype=torch.bfloat16) for m in (99, 100, 10**6)] == [own, best, best]
    x, weight = torch.zeros(2, 5), torch.zeros(4, 5)
    assert choice.module_for("forward", x, weight, 2, 2).__name__ == "rlrr_kernels.backends.reference"


def test_what_was_measured_holds_for_its_rank(measured):
    require("cpu")
    measured(entry(2, layer=(4, 5, 1), rank=3))
    x, weight = torch.zeros(2, 5), torch.zeros(4, 5)
    assert choice.explain(x, weight, rank=3) == ("reference", "measured fastest")
    assert choice.explain(x, weight) == ("cpu", "default for cpu")
    assert choice.explain(x, weight, rank=2)[1] != "measured fastest"


def test_each_pass_of_a_layer_runs_on_what_was_measured_for_it(measured):
    require("cpu")
    measured(entry(3, layer=(4, 5, 2), kernel="grad_scales"))
    p = make_problem(3, 4, 5, 2, dtype=torch.float32)
    ran = []

    def spied(name, kernel):
        run = getattr(choice.load(name), kernel)
        return mock.patch.object(choice.load(name), kernel, lambda *a: (ran.append((name, kernel)), run(*a))[1])

    with spied("cpu", "forward"), spied("cpu", "grad_input"), spied("reference", "grad_scales"):
        x, weight, u, v, bias, shift = p.forward_args
        given = x.requires_grad_(), weight, u.requires_grad_(), v.requires_grad_(), bias, shift
        rescaled_linear(*given).sum().backward()
        assert ran == [("cpu", "forward"), ("cpu", "grad_input"), ("reference", "grad_scales")]
        ran.clear()
        torch.ops.rlrr.grad_scales(torch.ones(3, 4), x.detach(), weight, u.detach(), v.detach(), False)
        assert ran == [("reference", "grad_scales")]


def test_entries_that_equal_the_default_are_not_looked_up(measured):
    require("cpu")
    measured(entry(3, layer=(4, 5, 1), backend="cpu"))
    with mock.patch.object(tuned, "find", side_effect=AssertionError("looked up")):
        assert choice.explain(torch.zeros(3, 5), torch.zeros(4, 5)) == ("cpu", "default for cpu")


def test_a_measured_backend_that_cannot_serve_is_ignored(measured):
    require("cpu")
    wide = {"dtype": torch.float64, "weight_dtype": torch.float64}
    measured(entry(1, math.inf, "triton", layer=None, **wide))
    x = torch.zeros(2, 5, dtype=torch.float64)
    assert backend_for(x, x) == "cpu"


def test_a_measured_backend_that_is_missing_gives_one_warning(measured, fresh, tmp_path):
    from rlrr_kernels.backends import library

    require("cpu")
    fresh.setattr(library, "FOLDER", tmp_path)
    fresh.delitem(sys.modules, "rlrr_kernels.backends.cuda", raising=False)
    measured(entry(1, math.inf, "cuda", layer=None))
    fresh.setitem(choice._loaded, "cpu", importlib.import_module("rlrr_kernels.backends.cpu"))
    x = torch.zeros(2, 5)
    with pytest.warns(UserWarning, match="'cuda' is not available, 'cpu' serves"):
        assert backend_for(x, x) == "cpu"


def test_the_shipped_part_is_whole_and_names_results_that_exist():
    root = Path(__file__).parents[2]
    assert tuned.shipped()
    for one in tuned.shipped():
        assert (root / one.measured["source"]).exists(), one.measured["source"]


def test_a_choice_forced_by_another_thread_meanwhile_is_not_kept_for_the_free_one(fresh):
    """The request is read once, so what is stored belongs to the key under which it is stored."""
    plan = choice._plan

    def interrupted(*given):
        fresh.setattr(choice, "_forced", "reference")  # as another thread's use_backend
        return plan(*given)

    x = torch.zeros(2, 4)
    fresh.setattr(choice, "_plan", interrupted)
    first = backend_for(x, x)
    fresh.setattr(choice, "_forced", None)
    fresh.setattr(choice, "_plan", plan)
    assert backend_for(x, x) == first == "cpu"


def test_each_dtype_of_w_and_each_rank_has_a_choice_of_its_own(fresh):
    x = torch.zeros(2, 4)
    assert backend_for(x, x) == "cpu"
    assert backend_for(x, x.half()) == "panels"
    fresh.setattr(choice.load("cpu"), "unsupported", lambda x, weight, rank=1: "rank" if rank > 2 else None)
    assert [backend_for(x, x, rank=rank) for rank in (2, 3)] == ["cpu", "panels"]
    assert backend_for(x, x) == "cpu"
