"""The kernels: each backend computes the passes of the two ops, and ``choice`` says which of them serves which call.

A backend is a module with these functions (shapes as in :mod:`rlrr_kernels.backends.reference`); it knows nothing of
``nn.Module``, autocast or autograd, and takes the rank from ``scale_out``::

    forward(x, weight, scale_out, scale_in, bias, shift) -> y
    grad_input(dy, weight, scale_out, scale_in) -> dx
    grad_scales(dy, x, weight, scale_out, scale_in, need_shift) -> (du, dv, df)
    grad_shift(dy) -> df, if neither u nor v trains
    unsupported(x, weight, rank=1) -> why it cannot serve these tensors at this rank, or None

and, if it serves LayerNorm too::

    layer_norm(x, weight, bias, scale, shift, eps, dtype) -> (y, mean, rstd)
    layer_norm_backward(dy, x, mean, rstd, weight, bias, scale, need_x) -> (dx, ds, dt)
    unsupported_layer_norm(x) -> why it cannot serve x, or None

It may also have ``build()``, which says what it was built with, and ``candidates(problem, device)``, the tiles that
``rlrr-tune`` measures and passes to the three passes as ``choice=``.

To add one, write the module and add its line to :data:`BACKENDS` (and its name to :data:`LAYER_NORM_BACKENDS`), and
what ``check`` is to run of it to :data:`rlrr_kernels.backends.verdicts.SUBJECTS`.
"""

#: name -> (module, device types it is tried for without being asked), best first.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("rlrr_kernels.backends.cpu", ("cpu",)),
    "gluon": ("rlrr_kernels.backends.triton.gluon", ("cuda",)),
    "triton": ("rlrr_kernels.backends.triton", ("cuda",)),
    # not yet measured on a GPU: by name, or where it was measured fastest
    "cuda": ("rlrr_kernels.backends.cuda", ()),
    "panels": ("rlrr_kernels.backends.panels", ("cuda", "cpu", "mps", "xpu")),
    # W' whole in each pass: by name, or where it was measured fastest (measured.json: float64 on CPUs)
    "reference": ("rlrr_kernels.backends.reference", ()),
}

#: The backends that serve LayerNorm, best first, for the device types above; ``reference`` serves all the rest.
LAYER_NORM_BACKENDS = ("triton",)
