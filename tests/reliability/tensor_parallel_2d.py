"""What ``test_tensor_parallel.py`` runs in four processes: two dimensions of a mesh, and shards of shards."""

import copy
import itertools

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from rlrr_kernels import FusedRLRRLinear
from rlrr_kernels.layers.parallel import clip_grad_norm_
from tests.oracle import Answer, check, make_problem
from tests.reliability import tensor_parallel_models as models
from tests.reliability.in_processes import case

CASES = {}
MESH = None
WHOLE = Replicate()


def start():
    global MESH
    MESH = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def sharded(p, placements):
    """A problem's layer with these placements of its parameters."""
    n, k = p.weight.shape
    layer = FusedRLRRLinear(k, n, groups=p.scale_in.shape[0], dtype=p.weight.dtype)
    with torch.no_grad():
        for name, parameter in list(layer.named_parameters()):
            parameter.copy_(getattr(p, name).view_as(parameter))
            parts = distribute_tensor(parameter.detach(), MESH, placements.get(name, [WHOLE, WHOLE]))
            layer.register_parameter(name, nn.Parameter(parts, parameter.requires_grad))
    return layer


def answer_of(layer, p, x_layout):
    x = p.x.clone().requires_grad_()
    y = layer(DTensor.from_local(x, MESH, [WHOLE, WHOLE]).redistribute(placements=x_layout)).full_tensor()
    y.backward(p.dy)
    for name in ("scale_out", "scale_in", "shift"):
        assert getattr(layer, name).grad.placements == getattr(layer, name).placements, name
    du, dv, df = (getattr(layer, name).grad.full_tensor() for name in ("scale_out", "scale_in", "shift"))
    return Answer(y.detach(), x.grad, du, dv.view_as(p.scale_in), df)


@case(CASES)
def every_pair_of_layouts_equals_one_process():
    """W in 9 layouts, x in 3; 1, 3 and 4 groups of 24 rows, of which each process has 24, 12 or 6."""
    pairs = list(itertools.product((WHOLE, Shard(0), Shard(1)), repeat=2))
    for groups, of_weight, x_layout in itertools.product((1, 3, 4), pairs, pairs[1::3]):
        p = make_problem(6, 24, 12, groups, torch.float64)
        check(p, answer_of(sharded(p, {"weight": of_weight}), p, x_layout))


@case(CASES)
def data_parallel_over_column_parallel_equals_one_process():
    p = make_problem(6, 24, 12, 3, torch.float64)
    rows = [WHOLE, Shard(0)]
    layer = sharded(p, {"weight": rows, "bias": rows, "scale_out": rows, "shift": rows})
    check(p, answer_of(layer, p, [Shard(0), WHOLE]))
    assert layer.weight.to_local().shape == (12, 12)


@case(CASES)
def a_vit_under_fsdp2_and_tensor_parallel_trains_as_one_process():
    """FSDP2 over tensor parallel: a shard of rows is cut again, in another order than the mesh's."""
    one = models.vit()
    many = parallelize_module(copy.deepcopy(one), MESH["tensor"], models.PLAN)
    for block in many.blocks:
        fully_shard(block, mesh=MESH["data"])
    fully_shard(many, mesh=MESH["data"])
    half = slice(2 * MESH["data"].get_local_rank(), 2 * MESH["data"].get_local_rank() + 2)
    optimizers = [torch.optim.AdamW(models.trained(m), lr=1e-2, foreach=False) for m in (one, many)]
    for _ in range(2):
        for m, part in ((one, slice(None)), (many, half)):
            nn.functional.cross_entropy(m(models.IMAGES[part]), models.LABELS[part]).backward()
        for (name, parameter), ours in zip(one.named_parameters(), many.parameters(), strict=True):
            # a constant on all keys changes no attention: the gradient of their shift is rounding
            if parameter.grad is not None and "qkv.shift" not in name:
                torch.testing.assert_close(models.full(ours.grad), parameter.grad, rtol=1e-11, atol=1e-12, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@case(CASES)
def a_row_that_divides_over_no_process_equals_one_process():
    """5 rows and 3 columns over four: some processes have none."""
    p = make_problem(6, 5, 3, 1, torch.float64)
    for of_weight in itertools.product((Shard(0), Shard(1)), repeat=2):
        check(p, answer_of(sharded(p, {"weight": list(of_weight)}), p, [WHOLE, WHOLE]))


@case(CASES)
def merged_weights_equal_one_process():
    for groups, of_weight in itertools.product((1, 3, 4), itertools.product((WHOLE, Shard(0), Shard(1)), repeat=2)):
        p = make_problem(2, 24, 12, groups, torch.float64)
        layer = sharded(p, {"weight": list(of_weight)})
        exact = sharded(p, {})
        for ours, theirs in zip(layer.merged_weight(), exact.merged_weight(), strict=True):
            assert torch.equal(ours.full_tensor(), theirs.full_tensor())
        assert layer.merged_weight()[0].placements == of_weight


@case(CASES)
def gradients_on_several_meshes_are_clipped_as_in_one_process():
    plain = [nn.Parameter(torch.zeros(6)) for _ in range(3)]
    meshes = (None, MESH["data"], MESH)
    parameters = [nn.Parameter(torch.zeros(6))] + [
        nn.Parameter(distribute_tensor(torch.zeros(6), mesh, [Shard(0)] * mesh.ndim)) for mesh in meshes[1:]
    ]
    for i, (parameter, one) in enumerate(zip(parameters, plain, strict=True)):
        one.grad = torch.arange(6.0) + i
        mesh, grad = meshes[i], one.grad.clone()  # whose memory a shard may share
        parameter.grad = grad if mesh is None else distribute_tensor(grad, mesh, parameter.placements)
    norm = clip_grad_norm_(parameters, 1.5)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain, 1.5))
    for parameter, one in zip(parameters, plain, strict=True):
        ours = parameter.grad
        torch.testing.assert_close(ours.full_tensor() if isinstance(ours, DTensor) else ours, one.grad)
    assert clip_grad_norm_([nn.Parameter(torch.zeros(1))], 1.0) == 0
    single = nn.Parameter(torch.zeros(3))
    single.grad = torch.full((3,), 2.0)
    assert clip_grad_norm_(single, 1.0) == 12**0.5
    torch.testing.assert_close(single.grad.norm(), torch.tensor(1.0))
