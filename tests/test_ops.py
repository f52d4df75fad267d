"""The registered ops, and which backend serves them."""

import sys
import threading
from unittest import mock

import pytest
import torch

from rlrr_kernels import backend_for, ops, rescaled_linear, use_backend
from rlrr_kernels.backends.triton import launch
from tests.oracle import device_of, make_problem

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(backend, groups, dtype):
    if backend == "triton" and dtype is torch.float64:
        pytest.skip("Triton's tensor cores have no float64 here")
    p = make_problem(7, 12, 10, groups, dtype, device=device_of(backend))
    scales = (p.weight, p.scale_out, p.scale_in)
    with use_backend(backend):
        for bias, shift in ((p.bias, p.shift), (None, None)):
            torch.library.opcheck(ops.forward, (p.x, *scales, bias, shift))
        torch.library.opcheck(ops.grad_input, (p.dy, *scales))
        for need_shift in (True, False):
            torch.library.opcheck(ops.grad_scales, (p.dy, p.x, *scales, need_shift))


def test_auto_serves_cpu_tensors_by_the_reference():
    x = torch.zeros(2, 4)
    assert backend_for(x, x) == "reference"


@pytest.mark.gpu
def test_auto_serves_gpu_tensors_by_triton_and_float64_by_the_reference(gpu):
    x = torch.zeros(2, 4, device=gpu)
    assert backend_for(x, x) == "triton"
    assert backend_for(x.double(), x.double()) == "reference"


@pytest.fixture
def choice():
    """A tensor that both backends can serve, the backend it gets by itself, and the other one."""
    x = torch.zeros(2, 4, device=device_of("triton"))
    own = backend_for(x, x)
    return x, own, "triton" if own == "reference" else "reference"


def test_use_backend_nests_and_ends(choice):
    x, own, other = choice
    with use_backend(other):
        assert backend_for(x, x) == other
        with use_backend("auto"):
            assert backend_for(x, x) == own
        assert backend_for(x, x) == other
    assert backend_for(x, x) == own


def test_use_backend_ends_after_an_error(choice):
    x, own, other = choice
    with pytest.raises(KeyError), use_backend(other):
        raise KeyError
    assert backend_for(x, x) == own


def test_use_backend_holds_in_other_threads(choice):
    """Backward of GPU tensors runs in autograd's own threads."""
    x, _, other = choice
    seen = []
    with use_backend(other):
        thread = threading.Thread(target=lambda: seen.append(backend_for(x, x)))
        thread.start()
        thread.join()
    assert seen == [other]


def test_environment_variable(choice, monkeypatch):
    x, own, other = choice
    monkeypatch.setenv("RLRR_BACKEND", other)
    assert backend_for(x, x) == other
    with use_backend(own):
        assert backend_for(x, x) == own
    monkeypatch.setenv("RLRR_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"RLRR_BACKEND: unknown backend 'tritn', expected one of auto, triton"):
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


def test_a_backend_that_cannot_be_imported_is_passed_over_and_named_when_asked_for(monkeypatch):
    """As on a platform Triton has no wheel for."""
    monkeypatch.setattr(ops, "_loaded", {})
    monkeypatch.setitem(sys.modules, "rlrr_kernels.backends.triton", None)
    x = torch.zeros(2, 4)
    assert backend_for(x, x) == "reference"
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot serve it cannot be imported"):
        backend_for(x, x)


def test_fakes_follow_symbolic_sizes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w, u, v = torch.empty(5, 8), torch.empty(6, 8), torch.empty(6, 1), torch.empty(2, 1, 8)
        assert ops.forward(x.bfloat16(), w, u, v, None, None).dtype is torch.bfloat16
        du, dv, df = ops.grad_scales(torch.empty(5, 6).bfloat16(), x.bfloat16(), w, u, v, True)
        assert [t.shape for t in (du, dv, df)] == [(6, 1), (2, 1, 8), (6,)]
        assert {t.dtype for t in (du, dv, df)} == {torch.float32}
