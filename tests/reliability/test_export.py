"""Exported programs (torch.export, ONNX, TorchScript, torch.fx) compute what the model does, without this package."""

import copy
import io
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import fx, nn
from torch.export import Dim, export

import rlrr_kernels
from rlrr_kernels import FusedRLRRLinear, SSFAffine, SSFLayerNorm, apply_rlrr, merge, merge_and_unload, use_backend
from rlrr_kernels.ops import layer_norm, linear
from tests.oracle import assert_close, differentiate, make_problem
from tests.small_models import X, small_swin, small_vit, stir

TABLE = rlrr_kernels.decomposition_table()
MODELS = {"vit": partial(small_vit, depth=1), "swin": partial(small_swin, depths=(1, 1))}
ANY_BATCH = ({0: Dim("batch", min=1)},)
#: TorchScript warns that it is deprecated, and that shapes are checked.
QUIET = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


def tuned(name):
    return stir(apply_rlrr(MODELS[name]()))


def images(batch):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def layer(**options):
    torch.manual_seed(0)
    made = FusedRLRRLinear(24, 18, **options)
    nn.init.normal_(made.shift)
    return made


def hold(got, model, x):
    """Hold a whole model to the yardstick: the formula in x's dtype and in float64."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), use_backend("reference"):
        assert_close("y", got.detach(), model(x), model.double()(x.double()))


def ours(program):
    """The package's ops in a program, those in graphs inside of it too."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if "rlrr" in str(node.target)}


# torch.export


@pytest.mark.parametrize(
    ("name", "merged", "strict"),
    [
        ("vit", False, False),
        pytest.param("vit", False, True, marks=pytest.mark.slow),
        pytest.param("vit", True, False, marks=pytest.mark.slow),
        pytest.param("swin", False, False, marks=pytest.mark.slow),
    ],
)
def test_exported_models_compute_the_same_at_any_batch(name, merged, strict):
    model = tuned(name)
    if merged:
        merge(model)
    with torch.no_grad():
        program = export(model, (X,), dynamic_shapes=ANY_BATCH, strict=strict)
        plain = program.run_decompositions(TABLE)
        for batch in (1, 3):
            assert torch.equal(program.module()(images(batch)), model(images(batch)))
            hold(plain.module()(images(batch)), model, images(batch))
    assert ours(program) == (set() if merged else {"rlrr.forward.default"})
    assert ours(plain) == set()


@pytest.mark.parametrize(
    ("groups", "dtype", "options"),
    [
        (1, torch.float32, {}),
        (3, torch.bfloat16, {"rank": 2, "scaling": 0.5}),
        pytest.param(3, torch.float64, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_exported_layers_compute_the_same_with_any_leading_dimensions(groups, dtype, options):
    made = layer(groups=groups, dtype=dtype, bias=groups == 1, **options)
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    program = export(made, (x,), dynamic_shapes=({0: Dim("b"), 1: Dim("t")},)).run_decompositions(TABLE)
    assert not ours(program)
    for given in (x, x[:3, :2].contiguous()):
        hold(program.module()(given), made, given)


def test_exported_under_autocast_the_decomposition_rounds_as_the_layer():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer(groups=3)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)

    x = torch.randn(5, 24)
    program = export(Cast(), (x,)).run_decompositions(TABLE)
    assert not ours(program)
    hold(program.module()(x), layer(groups=3), x.bfloat16())


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_trains_as_the_model(decomposed):
    model = nn.Sequential(SSFLayerNorm(24), layer(groups=3))
    x, dy = torch.randn(5, 24), torch.randn(5, 18)
    program = export(model, (x,))
    model(x).backward(dy)
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()  # the program may hold the same parameters
    module = (program.run_decompositions(TABLE) if decomposed else program).module()
    module(x).backward(dy)
    for name, p in module.named_parameters():
        if expected[name] is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, expected[name])
    assert sum(grad is not None for grad in expected.values()) == 5


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, dy):
        return ((self.model(x) * dy).sum(),)


def test_a_joint_graph_of_forward_and_backward_decomposes_and_computes_the_gradients():
    from torch._functorch.aot_autograd import aot_export_module

    p = make_problem(5, 18, 24, 3)
    made = FusedRLRRLinear(24, 18, groups=3)
    with torch.no_grad():
        for name in ("weight", "bias", "scale_out", "scale_in", "shift"):
            value = getattr(p, name)
            getattr(made, name).copy_(value.view(getattr(made, name).shape))
    graph, signature = aot_export_module(
        Loss(made), (p.x, p.dy), trace_joint=True, output_loss_index=0, decompositions=TABLE
    )
    assert not [name for name in map(str, (n.target for n in graph.graph.nodes)) if "rlrr" in name]
    state = dict(made.named_parameters(prefix="model"))
    outputs = graph(*(state[name] for name in signature.parameters), p.x, p.dy)
    node = next(n for n in graph.graph.nodes if n.op == "output")
    by_name = dict(zip([str(argument) for argument in node.args[0]], outputs, strict=True))
    grads = {to: by_name[name] for name, to in signature.backward_signature.gradients_to_parameters.items()}
    exact, wide = differentiate(p, torch.float64), differentiate(p, torch.float32)
    for name, key in (("scale_out", "du"), ("scale_in", "dv"), ("shift", "df")):
        got = grads[f"model.{name}"].view(getattr(exact, key).shape)
        assert_close(key, got, getattr(wide, key), getattr(exact, key))


def test_the_table_has_every_op_of_the_package_and_each_entry_computes_it():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rlrr::")}
    assert {str(op).replace(".default", "").replace(".", "::") for op in TABLE} == names
    p = make_problem(5, 12, 8, 3, rank=2)
    w, u, v = p.weight, p.scale_out, p.scale_in
    y, mean, rstd = layer_norm.layer_norm(p.x, None, None, v[0, 0], v[1, 0], 1e-5, torch.float32)
    arguments = {
        linear.forward: p.forward_args,
        linear.grad_input: (p.dy, w, u, v),
        linear.grad_scales: (p.dy, p.x, w, u, v, True),
        linear.grad_shift: (p.dy,),
        layer_norm.layer_norm: (p.x, v[2, 0], v[1, 0], v[0, 0], v[1, 0], 1e-5, torch.float32),
        layer_norm.layer_norm_backward: (y, p.x, mean, rstd, v[2, 0], v[1, 0], v[0, 0], True),
    }
    for op, function in TABLE.items():
        torch.testing.assert_close(function(*arguments[op]), op(*arguments[op]), msg=str(op))


# without this package

ALONE = """
import sys, torch
sys.modules["rlrr_kernels"] = None  # importing it is an error
for name in sys.argv[1:]:
    load = torch.jit.load if name.endswith(".ts") else lambda path: torch.export.load(path).module()
    program, (x, expected) = load(name), torch.load(name + ".io")
    assert torch.equal(program(x), expected), (name, (program(x) - expected).abs().max())
    print(name)
"""


@QUIET
@pytest.mark.slow
def test_plain_programs_are_loaded_and_give_the_same_bits_where_the_package_is_not(tmp_path):
    paths = []
    for name in MODELS:
        model = tuned(name)
        program = export(model, (X,), dynamic_shapes=ANY_BATCH).run_decompositions(TABLE)
        written = [(program.module(), tmp_path / f"{name}.pt2", partial(torch.export.save, program))]
        if name == "vit":
            traced = torch.jit.trace(model, X, check_trace=False)
            written.append((traced, tmp_path / f"{name}.ts", partial(torch.jit.save, traced)))
        for module, path, save in written:
            save(path)
            torch.save((images(3), module(images(3)).detach()), f"{path}.io")
            hold(module(images(3)), model, images(3))
            paths.append(str(path))
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    found = subprocess.run(
        [sys.executable, "-c", ALONE, *paths], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == paths


# ONNX


def run_onnx(program, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def need_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def test_onnx_of_a_model_needs_no_further_argument_and_takes_any_batch():
    need_onnx()
    model = tuned("vit")
    program = torch.onnx.export(model, (X,), dynamo=True, verbose=False, dynamic_shapes=ANY_BATCH)
    assert {node.domain for node in program.model.graph} <= {"", "ai.onnx"}
    for batch in (1, 5):
        hold(run_onnx(program.model_proto.SerializeToString(), images(batch)), model, images(batch))


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_onnx_of_an_exported_program_goes_through_the_decomposition(merged):
    need_onnx()
    made, x = layer(groups=3).eval(), torch.randn(5, 24)
    if merged:
        made.merge()
    program = export(made, (x,), dynamic_shapes=ANY_BATCH).run_decompositions(TABLE)
    written = torch.onnx.export(program, (), dynamo=True, verbose=False)
    for given in (x, x[:2]):
        hold(run_onnx(written.model_proto.SerializeToString(), given), made, given)


@pytest.mark.parametrize("name", MODELS)
@QUIET
def test_the_older_onnx_exporter_works_too(name):
    need_onnx()
    model, file = tuned(name), io.BytesIO()
    torch.onnx.export(
        model, (X,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}} if name == "vit" else None
    )
    hold(run_onnx(file.getvalue(), images(2)), model, images(2))


# torch.jit, torch.fx


@QUIET
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trace_holds_plain_ops_alone_and_can_be_trained(dtype):
    model = nn.Sequential(SSFAffine(24), SSFLayerNorm(24), layer(groups=3)).to(dtype)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    traced = torch.jit.trace(model, x, check_trace=False)  # it holds 16 bits to what float32 reaches
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not [kind for kind in kinds if not kind.startswith(("aten::", "prim::"))]
    assert "prim::PythonOp" not in kinds
    hold(traced(x[:3]), model, x[:3])
    traced(x).sum().backward()
    assert all(p.grad.any() for n, p in traced.named_parameters() if "scale" in n or "shift" in n)


@QUIET
@pytest.mark.parametrize("make", [layer, partial(SSFLayerNorm, 24), partial(SSFAffine, 24), partial(tuned, "vit")])
def test_scripting_is_refused_with_a_remedy(make):
    model = make()
    with pytest.raises(RuntimeError, match=r": torch\.jit\.script cannot compile it; use torch\.export or torch\.jit"):
        torch.jit.script(model)


@QUIET
def test_what_merge_and_unload_returns_can_be_scripted():
    model = nn.Sequential(SSFLayerNorm(24), layer())
    x = torch.randn(5, 24)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(merge_and_unload(model))(x), expected)


def test_symbolic_tracing_takes_adapters_as_leaves_and_refuses_to_enter_them():
    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            kinds = FusedRLRRLinear, SSFLayerNorm, SSFAffine
            return isinstance(module, kinds) or super().is_leaf_module(module, name)

    model = nn.Sequential(SSFAffine(24), SSFLayerNorm(24), layer(), nn.ReLU())
    graph = fx.GraphModule(model, Leaves().trace(model))
    x = torch.randn(5, 24)
    assert torch.equal(graph(x), model(x))
    for part in model[:3]:
        with pytest.raises(TypeError, match=r"x: expected a (floating-point )?tensor, got Proxy"):
            fx.symbolic_trace(part)
