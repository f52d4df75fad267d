"""Which backend serves which tensors."""

import importlib
import json
import sys
import threading
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from rlrr_kernels import backend_for, rescaled_linear, use_backend
from rlrr_kernels.backends import choice
from rlrr_kernels.backends.triton import launch
from tests.oracle import device_of, make_problem, require


def test_auto_serves_cpu_tensors_by_the_cpu_ops_and_what_they_refuse_by_panels():
    require("cpu")
    x = torch.zeros(2, 4)
    served = {dtype: backend_for(x.to(dtype), x.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    assert set(served.values()) == {"cpu"}
    assert backend_for(x.half(), x.half()) == "panels"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' cannot serve x torch.float16.* float32 and bfl"):
        backend_for(x.half(), x.half())


@pytest.mark.gpu
def test_auto_serves_gpu_tensors_by_triton_and_float64_by_panels(gpu):
    x = torch.zeros(2, 4, device=gpu)
    assert backend_for(x, x) == "triton"
    assert backend_for(x.double(), x.double()) == "panels"


@pytest.fixture
def tensors():
    """A tensor that two backends can serve, the backend it gets by itself, and the other one."""
    x = torch.zeros(2, 4, device=device_of("triton"))
    own = backend_for(x, x)
    return x, own, "triton" if own != "triton" else "panels"


def test_use_backend_nests_and_ends(tensors):
    x, own, other = tensors
    with use_backend(other):
        assert backend_for(x, x) == other
        with use_backend("auto"):
            assert backend_for(x, x) == own
        assert backend_for(x, x) == other
    assert backend_for(x, x) == own


def test_use_backend_ends_after_an_error(tensors):
    x, own, other = tensors
    with pytest.raises(KeyError), use_backend(other):
        raise KeyError
    assert backend_for(x, x) == own


def test_use_backend_holds_in_other_threads(tensors):
    """Backward of GPU tensors runs in autograd's own threads."""
    x, _, other = tensors
    seen = []
    with use_backend(other):
        thread = threading.Thread(target=lambda: seen.append(backend_for(x, x)))
        thread.start()
        thread.join()
    assert seen == [other]


def test_environment_variable(tensors, monkeypatch):
    x, own, other = tensors
    monkeypatch.setenv("RLRR_BACKEND", other)
    assert backend_for(x, x) == other
    with use_backend(own):
        assert backend_for(x, x) == own
    monkeypatch.setenv("RLRR_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"RLRR_BACKEND: unknown backend 'tritn', expected one of auto, cpu, triton"):
        backend_for(x, x)


def test_unknown_name():
    with pytest.raises(ValueError, match="use_backend: unknown backend 'cudnn'"), use_backend("cudnn"):
        pass


def test_a_named_backend_that_cannot_serve_is_an_error_not_a_silent_change():
    p = make_problem(3, 4, 5, dtype=torch.float64)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' cannot serve .*float64.*reference"):
        rescaled_linear(*p.forward_args)


def test_triton_says_why_it_cannot_serve_cpu_tensors():
    with mock.patch.object(launch, "interpreting", return_value=False):
        assert "runs on NVIDIA GPUs" in launch.unsupported(torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.fixture
def fresh(monkeypatch):
    """Nothing loaded, nothing warned of, no rule read."""
    monkeypatch.setattr(choice, "_loaded", {})
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(choice, "_plans", {})
    monkeypatch.setattr(choice, "_rules", choice._rules.__wrapped__)
    return monkeypatch


def test_a_backend_that_cannot_be_imported_is_an_error_when_asked_for(fresh):
    """As on a platform Triton has no wheel for."""
    fresh.setitem(sys.modules, "rlrr_kernels.backends.triton", None)
    x = torch.zeros(2, 4)
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot serve it cannot be imported"):
        backend_for(x, x)


def test_a_missing_library_is_said_once_with_the_remedy_and_panels_serve(fresh, tmp_path):
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


def test_a_library_for_another_torch_is_said_with_the_remedy(fresh, tmp_path):
    from rlrr_kernels.backends import library

    (tmp_path / "librlrr_cpu.so").write_bytes(b"not a library")
    fresh.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(
        ImportError, match=rf"does not load with torch {torch.__version__[:4]}.*; reinstall from the source folder: pip"
    ):
        library.load("cpu", "a C++ compiler")


def test_importing_the_package_neither_loads_nor_warns():
    """A machine without a compiler hears of it when a backend is wanted, not at import."""
    import subprocess

    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "from rlrr_kernels.backends import library, choice\n"
        "library.load = lambda *a: 1 / 0\n"
        "import rlrr_kernels; assert choice._loaded == {}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _with_rules(fresh, *rules):
    text = json.dumps(list(rules))
    fresh.setattr(choice.resources, "files", lambda _: mock.Mock(joinpath=lambda _: mock.Mock(read_text=lambda: text)))


def test_a_measured_rule_goes_before_the_default_within_its_tokens(fresh):
    require("cpu")
    rule = {"device": "cpu", "dtype": "float32", "tokens": [2, 3], "backend": "reference", "source": "-"}
    _with_rules(fresh, rule)
    weight = torch.zeros(4, 5)
    served = [backend_for(torch.zeros(m, 5), weight) for m in (1, 2, 3, 4)]
    assert served == ["cpu", "reference", "reference", "cpu"]
    assert backend_for(torch.zeros(2, 5).bfloat16(), weight) == "cpu"
    assert choice.explain(torch.zeros(2, 5), weight) == ("reference", "measured fastest")


def test_a_measured_rule_that_cannot_serve_is_passed_over(fresh):
    require("cpu")
    _with_rules(fresh, {"device": "cpu", "dtype": "float64", "tokens": [1, None], "backend": "triton", "source": "-"})
    x = torch.zeros(2, 5, dtype=torch.float64)
    assert backend_for(x, x) == "cpu"


def test_a_measured_backend_that_is_not_here_is_said_once(fresh, tmp_path):
    from rlrr_kernels.backends import library

    require("cpu")
    fresh.setattr(library, "FOLDER", tmp_path)
    fresh.delitem(sys.modules, "rlrr_kernels.backends.cuda", raising=False)
    _with_rules(fresh, {"device": "cpu", "dtype": "float32", "tokens": [1, None], "backend": "cuda", "source": "-"})
    fresh.setitem(choice._loaded, "cpu", importlib.import_module("rlrr_kernels.backends.cpu"))
    x = torch.zeros(2, 5)
    with pytest.warns(UserWarning, match="'cuda' is not available, 'cpu' serves"):
        assert backend_for(x, x) == "cpu"


def test_the_shipped_rules_name_backends_dtypes_and_results_that_exist():
    root = Path(__file__).parents[2]
    rules = json.loads((Path(choice.__file__).parent / "measured.json").read_text())
    for rule in rules:
        assert set(rule) == {"device", "dtype", "tokens", "backend", "source"}
        assert rule["backend"] in choice.BACKENDS
        assert isinstance(getattr(torch, rule["dtype"]), torch.dtype)
        assert (root / rule["source"]).exists(), rule["source"]


def test_a_choice_forced_by_another_thread_meanwhile_is_not_kept_for_the_free_one(fresh):
    """The request is read once: what is stored belongs to the key that it is stored under."""
    plan = choice._plan

    def interrupted(asked, x, weight):
        fresh.setattr(choice, "_forced", "reference")  # as another thread's use_backend
        return plan(asked, x, weight)

    x = torch.zeros(2, 4)
    fresh.setattr(choice, "_plan", interrupted)
    first = backend_for(x, x)
    fresh.setattr(choice, "_forced", None)
    fresh.setattr(choice, "_plan", plan)
    assert backend_for(x, x) == first == "cpu"


def test_each_dtype_of_w_has_a_choice_of_its_own(fresh):
    x = torch.zeros(2, 4)
    assert backend_for(x, x) == "cpu"
    assert backend_for(x, x.half()) == "panels"
    assert backend_for(x, x) == "cpu"
