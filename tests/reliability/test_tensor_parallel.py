"""Tensor parallel layers by DTensor equal one process: columns, rows, any layout, a mesh of two by two."""

import copy
import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from rlrr_kernels import FusedRLRRLinear, SSFLayerNorm
from rlrr_kernels.layers.parallel import RLRRColwiseParallel, RLRRRowwiseParallel, RLRRSequenceParallel
from rlrr_kernels.ops import sharding
from tests.oracle import Answer, assert_close, check, make_problem
from tests.reliability.in_processes import full, in_processes, mesh

WHOLE = Replicate()
STYLES = (RLRRColwiseParallel, RLRRRowwiseParallel)


def laid_out(t, *placements):
    """A plain tensor, the same in all processes, as a DTensor; differentiable."""
    return DTensor.from_local(t, mesh(), [WHOLE] * mesh().ndim).redistribute(placements=placements)


def layer_of(p):
    """The layer of a problem, all of whose dtypes are as the problem's."""
    n, k = p.weight.shape
    groups, rank, _ = p.scale_in.shape
    layer = FusedRLRRLinear(k, n, p.bias is not None, groups=groups, dtype=p.weight.dtype, rank=rank)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(getattr(p, name).view_as(parameter))
    return layer


def sharded_layer_of(p, **placements):
    """The same with these placements of its parameters; those that are not named are whole."""
    layer = layer_of(p)
    for name, parameter in list(layer.named_parameters()):
        parts = distribute_tensor(parameter.detach(), mesh(), placements.get(name, [WHOLE] * mesh().ndim))
        layer.register_parameter(name, nn.Parameter(parts, parameter.requires_grad))
    return layer


def answer_of(layer, p, *x_layout, autocast=False):
    """y and gradients of a sharded layer, gathered; parameters' gradients must be laid out as the parameters."""
    x = p.x.clone().requires_grad_()
    given = laid_out(x, *x_layout) if x_layout else x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(given)
    y = full(y)
    y.backward(p.dy)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.placements == parameter.placements, name
            assert parameter.grad.dtype == parameter.dtype, name
        else:
            assert parameter.grad is None, name
    du, dv, df = (full(getattr(layer, name).grad) for name in ("scale_out", "scale_in", "shift"))
    return Answer(y.detach(), x.grad, du, dv.view_as(p.scale_in), df)


def whole_y(style, **options):
    """A style whose layer gives a DTensor."""
    return style(use_local_output=False, **options)


SETTINGS = [
    (groups, bias, dtype, 1)
    for groups, bias, dtype in itertools.product(
        (1, 2, 3, 6), (True, False), (torch.float64, torch.float32, torch.bfloat16)
    )
] + [(1, True, torch.float64, 3), (3, False, torch.float32, 4), (3, True, torch.bfloat16, 2)]


def equals_one_process(style, *x_layout):
    for groups, bias, dtype, rank in SETTINGS:
        frozen = torch.float32 if dtype is torch.bfloat16 else None
        p = make_problem(10, 36, 24, groups, dtype, frozen, bias, rank=rank)
        layer = parallelize_module(layer_of(p), mesh(), whole_y(style))
        autocast = dtype is torch.bfloat16
        wide = dataclasses.replace(p, x=p.x.float()) if autocast else p
        got = answer_of(layer, wide, *x_layout, autocast=autocast)
        check(p, dataclasses.replace(got, dx=got.dx.to(dtype)))


@in_processes(2)
def test_a_column_parallel_layer_equals_one_process():
    """27 settings: groups, bias, ranks, float64, float32 and autocast to bfloat16, by the yardstick."""
    equals_one_process(RLRRColwiseParallel)


@in_processes(2)
def test_a_row_parallel_layer_equals_one_process():
    equals_one_process(RLRRRowwiseParallel, Shard(1))


@pytest.mark.slow
@in_processes(2)
def test_sides_that_do_not_divide_equal_one_process():
    for style, (n, k) in itertools.product(STYLES, ((7, 5), (1, 8), (8, 1), (3, 3))):
        p = make_problem(4, n, k, dtype=torch.float64)
        check(p, answer_of(parallelize_module(layer_of(p), mesh(), whole_y(style)), p, WHOLE))


@pytest.mark.slow
@in_processes(2)
def test_every_layout_of_x_y_and_parameters_equals_one_process():
    """Layouts that no style chooses too: each is computed as it is, or brought into one that is right."""
    p = make_problem(6, 18, 12, 3, torch.float64)
    outs = (WHOLE, Shard(0), Shard(1))
    for style, x_layout, y_layout in itertools.product(STYLES, outs, outs):
        layer = parallelize_module(layer_of(p), mesh(), whole_y(style, output_layouts=y_layout))
        check(p, answer_of(layer, p, x_layout))
    # v [3, 1, K] over two processes, W whole with x sharded in each way, and all of them against each other
    layouts = itertools.product((WHOLE, Shard(0), Shard(1)), (WHOLE, Shard(0)), (WHOLE, Shard(0), Shard(2)), outs)
    for of_weight, of_u, of_v, x_layout in layouts:
        layer = sharded_layer_of(p, weight=[of_weight], scale_out=[of_u], scale_in=[of_v], shift=[of_u])
        check(p, answer_of(layer, p, x_layout))


@pytest.mark.slow
@in_processes(2)
def test_more_dimensions_of_x_equal_one_process():
    for style, shape in itertools.product(STYLES, ((12,), (2, 12), (2, 3, 12), (2, 3, 2, 12), (0, 12))):
        torch.manual_seed(0)
        one = FusedRLRRLinear(12, 18, groups=3, dtype=torch.float64)
        many = parallelize_module(copy.deepcopy(one), mesh(), whole_y(style))
        x = torch.randn(shape, dtype=torch.float64)
        dy = torch.randn(*shape[:-1], 18, dtype=torch.float64)
        y = one(x)
        grads = torch.autograd.grad(y, [one.scale_out, one.scale_in, one.shift], dy)
        sharded = full(many(laid_out(x, WHOLE)))
        got = torch.autograd.grad(sharded, [many.scale_out, many.scale_in, many.shift], dy)
        for ours, exact in zip((sharded, *got), (y, *grads), strict=True):
            torch.testing.assert_close(full(ours), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@in_processes(2)
def test_groups_that_do_not_divide_are_gathered_or_refused():
    """9 rows in 3 groups over 2 processes: no equal blocks."""
    p = make_problem(4, 9, 12, 3, torch.float64)
    with pytest.raises(ValueError, match="9 rows in 3 groups do not fall into equal blocks over 2 processes"):
        parallelize_module(layer_of(p), mesh(), RLRRColwiseParallel())
    check(p, answer_of(parallelize_module(layer_of(p), mesh(), whole_y(RLRRRowwiseParallel)), p, Shard(1)))
    # PyTorch's style shards the rows anyway, and v [3, 1, K] unevenly
    layer = parallelize_module(layer_of(p), mesh(), ColwiseParallel(use_local_output=False))
    check(p, answer_of(layer, p, WHOLE))


@pytest.mark.slow
@in_processes(2)
def test_pytorchs_own_styles_equal_one_process():
    for groups, bias in itertools.product((1, 2, 3), (True, False)):
        p = make_problem(4, 18, 12, groups, torch.float64, bias=bias)
        layer = parallelize_module(layer_of(p), mesh(), ColwiseParallel(use_local_output=False))
        check(p, answer_of(layer, p, WHOLE))
        layer = parallelize_module(layer_of(p), mesh(), RowwiseParallel(use_local_output=False))
        check(p, answer_of(layer, p, Shard(1)))


@pytest.mark.slow
@in_processes(2)
def test_a_trained_weight_and_bias_get_their_gradients():
    for style, groups in itertools.product(STYLES, (1, 3)):
        p = make_problem(5, 18, 12, groups, torch.float64)
        one = layer_of(p).requires_grad_()
        many = parallelize_module(copy.deepcopy(one), mesh(), whole_y(style))
        one(p.x).backward(p.dy)
        full(many(laid_out(p.x, WHOLE))).backward(p.dy)
        for (name, parameter), ours in zip(one.named_parameters(), many.parameters(), strict=True):
            assert ours.grad.placements == ours.placements, name
            torch.testing.assert_close(full(ours.grad), parameter.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.slow
@in_processes(2)
def test_an_infinite_shift_is_added_once_and_makes_no_nan():
    layer = FusedRLRRLinear(12, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.shift.copy_(torch.tensor([torch.inf, -torch.inf, 2.0**100, 0]))
    y = parallelize_module(layer, mesh(), RLRRRowwiseParallel(input_layouts=WHOLE))(torch.ones(2, 12).double())
    assert (y[:, 0] == torch.inf).all()
    assert (y[:, 1] == -torch.inf).all()
    assert (y[:, 2] == 2.0**100).all()


@pytest.mark.slow
@in_processes(2)
def test_second_derivatives_are_right_or_one_clear_error():
    p = make_problem(4, 18, 12, 3, torch.float64)

    def second(layer, x):
        dv, du = torch.autograd.grad(full(layer(x)).pow(3).sum(), (layer.scale_in, layer.scale_out), create_graph=True)
        loss = full(dv.square().sum()) + full(du.square().sum())
        return [full(g) for g in torch.autograd.grad(loss, (layer.scale_in, layer.scale_out, layer.shift))]

    exact = second(layer_of(p), p.x)
    for style, layout in ((RLRRColwiseParallel, WHOLE), (RLRRRowwiseParallel, Shard(1)), (ColwiseParallel, Shard(0))):
        layer = parallelize_module(layer_of(p), mesh(), style(use_local_output=False))
        if sharding._TWICE:
            for ours, theirs in zip(second(layer, laid_out(p.x, layout)), exact, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        else:
            with pytest.raises(RuntimeError, match="second derivatives of a tensor parallel layer: torch"):
                second(layer, laid_out(p.x, layout))


@pytest.mark.slow
@in_processes(2)
def test_a_compiled_layer_equals_one_process():
    p = make_problem(4, 18, 12, 3, torch.float64)
    for style, layout in ((RLRRColwiseParallel, WHOLE), (RLRRRowwiseParallel, Shard(1))):
        layer = parallelize_module(layer_of(p), mesh(), whole_y(style))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = laid_out(p.x, layout)
        y = compiled(x)
        full(y).backward(p.dy)
        exact = layer_of(p)
        exact(p.x).backward(p.dy)
        torch.testing.assert_close(full(y), exact(p.x), rtol=1e-12, atol=1e-12)
        for name in ("scale_out", "scale_in", "shift"):
            ours, theirs = getattr(layer, name), getattr(exact, name).grad
            assert ours.grad.placements == ours.placements
            torch.testing.assert_close(full(ours.grad), theirs, rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.norm = SSFLayerNorm(12, dtype=dtype)
        self.fc1 = FusedRLRRLinear(12, 24, dtype=dtype)
        self.fc2 = FusedRLRRLinear(24, 12, dtype=dtype)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


@pytest.mark.slow
@in_processes(2)
def test_tokens_sharded_between_the_layers_equal_one_process():
    """SSFLayerNorm, column and row with x and y sharded over the tokens; in bfloat16 the norm is our own op."""
    styles = {
        "norm": RLRRSequenceParallel(use_local_output=False),
        "fc1": RLRRColwiseParallel(),
        "fc2": RLRRRowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    x = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = backward_of_squares(Block(torch.float64), x)
    for dtype in (torch.float64, torch.bfloat16):
        plain = backward_of_squares(Block(dtype), x.to(dtype))
        many = parallelize_module(Block(dtype), mesh(), styles)
        ours = backward_of_squares(many, laid_out(x.to(dtype), Shard(1)))
        assert ours.keys() == exact.keys()
        # the sum of two parts in bfloat16 is one rounding more
        more = torch.finfo(dtype).eps
        for name, got in ours.items():
            assert_close(name, got, plain[name], exact[name], more)
        for name, parameter in many.named_parameters():
            assert parameter.requires_grad == ("weight" not in name and "bias" not in name), name
            assert parameter.grad is None or parameter.grad.placements == parameter.placements, name


def backward_of_squares(block, x):
    y = block(x)
    full(y).double().square().sum().backward()
    return {"y": full(y).detach()} | {n: full(p.grad) for n, p in block.named_parameters() if p.grad is not None}


@pytest.mark.slow
@in_processes(2)
def test_a_norm_gathers_what_it_cannot_work_on():
    x = torch.randn(4, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        one = SSFLayerNorm(12, dtype=dtype)
        exact = one(x.to(dtype))
        grads = torch.autograd.grad(exact.float().square().sum(), (one.ssf_scale, one.ssf_shift))
        for layout in (WHOLE, Shard(0), Shard(1), Shard(2)):
            many = parallelize_module(copy.deepcopy(one), mesh(), whole_y(RLRRSequenceParallel, output_layouts=layout))
            y = many(laid_out(x.to(dtype), layout))
            assert y.placements == (layout,)
            assert torch.equal(full(y), exact)
            ours = torch.autograd.grad(full(y).float().square().sum(), (many.ssf_scale, many.ssf_shift))
            for our, theirs in zip(ours, grads, strict=True):
                assert our.placements == (WHOLE,)
                torch.testing.assert_close(our.full_tensor(), theirs, rtol=1e-5, atol=1e-5)  # float32 sums, parted
        many = parallelize_module(copy.deepcopy(one), mesh(), RLRRSequenceParallel())
        own = mesh().get_local_rank()  # of a plain x, the style takes this process's half of the tokens
        assert torch.equal(many(x.to(dtype).chunk(2, 1)[own]), exact.chunk(2, 1)[own])


@pytest.mark.slow
@in_processes(2)
def test_what_cannot_be_sharded_is_one_clear_error():
    x = torch.ones(2, 12)
    with pytest.raises(TypeError, match="RLRRColwiseParallel: expected a FusedRLRRLinear, got Linear"):
        parallelize_module(nn.Linear(2, 2), mesh(), RLRRColwiseParallel())
    with pytest.raises(TypeError, match="RLRRSequenceParallel: expected a SSFLayerNorm, got LayerNorm"):
        parallelize_module(nn.LayerNorm(2), mesh(), RLRRSequenceParallel())
    with pytest.raises(TypeError, match="weight: expected a DTensor, as x is one, got Parameter"):
        SSFLayerNorm(12)(laid_out(x, WHOLE))
    merged = FusedRLRRLinear(12, 4)
    merged.merge()
    with pytest.raises(RuntimeError, match="RLRRRowwiseParallel: u, v, f are merged; unmerge before"):
        parallelize_module(merged, mesh(), RLRRRowwiseParallel())
    # adapted after the plain layer was sharded
    layer = FusedRLRRLinear.from_linear(parallelize_module(nn.Linear(12, 4), mesh(), ColwiseParallel()))
    with pytest.raises(TypeError, match="scale_out: expected a DTensor, as weight is one, got Parameter"):
        layer(laid_out(x, WHOLE))
    layer = parallelize_module(FusedRLRRLinear(12, 4), mesh(), whole_y(RLRRColwiseParallel))
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 12\]"):
        layer(torch.ones(2, 11))
    with pytest.raises(TypeError, match="x: expected a DTensor, as weight is one, got Tensor"):
        FusedRLRRLinear.forward(layer, x)
    other = init_device_mesh("cpu", (1, 2))
    with pytest.raises(ValueError, match="x: expected device mesh"):
        layer(DTensor.from_local(x, other, [WHOLE, WHOLE]))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        FusedRLRRLinear(12, 4)(laid_out(x, WHOLE))


@pytest.mark.slow
@in_processes(2, 2)
def test_every_pair_of_layouts_on_a_mesh_of_two_by_two_equals_one_process():
    """W in 9 layouts, x in 3; 1, 3 and 4 groups of 24 rows, of which each process has 24, 12 or 6."""
    pairs = list(itertools.product((WHOLE, Shard(0), Shard(1)), repeat=2))
    for groups, of_weight, x_layout in itertools.product((1, 3, 4), pairs, pairs[1::3]):
        p = make_problem(6, 24, 12, groups, torch.float64)
        layer = sharded_layer_of(p, weight=of_weight)
        check(p, answer_of(layer, p, *x_layout))
        weight, bias = layer.merged_weight()
        assert weight.placements == of_weight
        for ours, exact in zip((weight, bias), layer_of(p).merged_weight(), strict=True):
            assert torch.equal(ours.full_tensor(), exact)


@pytest.mark.slow
@in_processes(2, 2)
def test_data_parallel_over_column_parallel_equals_one_process():
    p = make_problem(6, 24, 12, 3, torch.float64)
    layer = sharded_layer_of(p, **{name: (WHOLE, Shard(0)) for name in ("weight", "bias", "scale_out", "shift")})
    check(p, answer_of(layer, p, Shard(0), WHOLE))
    assert layer.weight.to_local().shape == (12, 12)


@pytest.mark.slow
@in_processes(2, 2)
def test_five_rows_and_three_columns_over_four_processes_equal_one():
    """Some processes have none."""
    p = make_problem(6, 5, 3, 1, torch.float64)
    for of_weight in itertools.product((Shard(0), Shard(1)), repeat=2):
        check(p, answer_of(sharded_layer_of(p, weight=of_weight), p, WHOLE, WHOLE))


@pytest.mark.slow
def test_the_package_does_not_load_dtensor():
    """Its import takes longer than the package's, and some builds of PyTorch lack it."""
    script = "import rlrr_kernels, sys; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
