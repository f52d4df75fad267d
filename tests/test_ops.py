"""The registered ops: schemas, fakes, and what torch.library.opcheck says of them."""

import pytest
import torch

from rlrr_kernels import ops, use_backend
from tests.oracle import BACKENDS, make_problem, require

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, groups, dtype):
    p = make_problem(7, 12, 10, groups, dtype, device=require(backend, dtype))
    scales = (p.weight, p.scale_out, p.scale_in)
    with use_backend(backend):
        for bias, shift in ((p.bias, p.shift), (None, None)):
            torch.library.opcheck(ops.forward, (p.x, *scales, bias, shift))
        torch.library.opcheck(ops.grad_input, (p.dy, *scales))
        for need_shift in (True, False):
            torch.library.opcheck(ops.grad_scales, (p.dy, p.x, *scales, need_shift))


def test_fakes_follow_symbolic_sizes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w, u, v = torch.empty(5, 8), torch.empty(6, 8), torch.empty(6, 1), torch.empty(2, 1, 8)
        assert ops.forward(x.bfloat16(), w, u, v, None, None).dtype is torch.bfloat16
        du, dv, df = ops.grad_scales(torch.empty(5, 6).bfloat16(), x.bfloat16(), w, u, v, True)
        assert [t.shape for t in (du, dv, df)] == [(6, 1), (2, 1, 8), (6,)]
        assert {t.dtype for t in (du, dv, df)} == {torch.float32}
