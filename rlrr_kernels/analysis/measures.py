"""Measures of the update of one weight, from singular value decompositions.

A weight W [N, K] acts as y = W x. In W = U diag(s) V^T the columns of U are directions of the output (N) and the
columns of V directions of the input (K). RLRR's paper (arXiv 2403.19067) writes X W, so its left is the input here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Number of evenly spaced samples of a spectrum, from the first to the last singular value.
SPECTRUM_POINTS = 33

#: Quantiles that describe a distribution.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

_BINS = 40


@dataclass(frozen=True)
class Decomposition:
    """W = u diag(s) vh, thin, s descending. W [N, K], u [N, r], s [r], vh [r, K] with r = min(N, K)."""

    weight: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor

    @property
    def rank(self) -> int:
        """Number of singular values above W's rounding errors."""
        return int((self.s > _noise(self.weight, self.s[0])).sum())


@dataclass(frozen=True)
class LayerView:
    """How W' differs from W. Plain numbers and lists: :func:`dataclasses.asdict` is JSON-ready.

    Attributes:
        shape: [N, K].
        top: k, the number of leading singular vectors compared: as requested, but at most the ranks of W and W'.
        singular_values, singular_values_updated: The k largest of W and of W'.
        spectrum, spectrum_updated: All of them, at :data:`SPECTRUM_POINTS` evenly spaced positions.
        gap: (s_k - s_k+1) / s_1 of W. If it is small compared with ``update_norm``, the k leading directions are not
            separated from the next, and a small update may turn them far (Wedin 1972).
        angles_out, angles_in: The k principal angles in degrees, ascending, between the leading output (input)
            directions of W and those of W'.
        rotation_out, rotation_in: Root mean square of these angles.
        relative_update: ||W' - W||_F / ||W||_F.
        update_norm: ||W' - W||_2 / ||W||_2.
        norm_ratio: ||W'||_2 / ||W||_2.
        effective_rank, effective_rank_updated: exp of the entropy of s / sum(s) (Roy and Vetterli, 2007).
        update_rank: Number of singular values of W' - W above rounding errors.
        update_effective_rank: The effective rank of W' - W.
        share_out, share_in: Share of ||W' - W||_F^2 that the best diag(a) W (W diag(c)) explains: rescaling of one
            side. This and the next two are None if W' = W.
        share_rescaling: Share of the best W * (a c^T), the form of RLRR. Found by alternating least squares from both
            one-sided solutions: a lower bound that is at least as large as either.
        share_low_rank: Share of the best matrix of rank k.
    """

    shape: tuple[int, int]
    top: int
    singular_values: list[float]
    singular_values_updated: list[float]
    spectrum: list[float]
    spectrum_updated: list[float]
    gap: float
    angles_out: list[float]
    angles_in: list[float]
    rotation_out: float
    rotation_in: float
    relative_update: float
    update_norm: float
    norm_ratio: float
    effective_rank: float
    effective_rank_updated: float
    update_rank: int
    update_effective_rank: float
    share_out: float | None
    share_in: float | None
    share_rescaling: float | None
    share_low_rank: float | None


@dataclass(frozen=True)
class Distribution:
    """Values at :data:`QUANTILES`, moments, and a histogram of equal bins from ``low`` to ``high``."""

    quantiles: list[float]
    mean: float
    std: float
    low: float
    high: float
    counts: list[int]


@dataclass(frozen=True)
class ScalesView:
    """Distributions of u and v in W' = W * (1 + u v), and of 1 + u v.

    Only the product u v is determined: c u and v / c give the same W'.

    Attributes:
        u, v: The entries of u and v.
        factor: The entries of 1 + u v.
        rms: Root mean square of u v.
        flipped: Fraction of entries whose sign changes (1 + u v < 0).
    """

    u: Distribution
    v: Distribution
    factor: Distribution
    rms: float
    flipped: float


def decompose(weight: Tensor) -> Decomposition:
    """The thin singular value decomposition of W ``[N, K]``: in float64 on a CPU, in float32 elsewhere.

    Raises:
        ValueError: If the weight is no matrix of finite floating-point numbers, or is all zero.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight: expected a floating-point matrix, got {weight.dtype} of shape {list(weight.shape)}")
    weight = weight.detach().to(_working_dtype(weight))
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite numbers, got infinite ones or NaN")
    if not bool(weight.any()):
        raise ValueError("weight: all zero, so it has no directions to compare")
    if weight.shape[0] >= weight.shape[1]:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        # LAPACK is four times as fast for the tall one
        v, s, uh = torch.linalg.svd(weight.T, full_matrices=False)
        u, vh = uh.T, v.T
    return Decomposition(weight, u, s, vh)


def layer_view(weight: Tensor | Decomposition, updated: Tensor, *, top: int = 8) -> LayerView:
    """Compare W' with W.

    Args:
        weight: W ``[N, K]``, or its :func:`decompose` if several updates of one W are compared.
        updated: W' ``[N, K]``.
        top: Number of leading singular vectors to compare, 1 or more.

    Raises:
        ValueError: If shapes differ, ``top`` is less than 1, or :func:`decompose` refuses W or W'.
    """
    if top < 1:
        raise ValueError(f"top: expected 1 or more, got {top}")
    old = weight if isinstance(weight, Decomposition) else decompose(weight)
    if updated.shape != old.weight.shape:
        raise ValueError(f"updated: expected shape {list(old.weight.shape)}, got {list(updated.shape)}")
    new = decompose(updated.to(old.weight.device))
    update = new.weight - old.weight
    # the singular vectors of the update are not needed
    s = torch.linalg.svdvals(update if update.shape[0] >= update.shape[1] else update.T)
    # vectors of singular values that are rounding errors are arbitrary
    k = min(top, old.rank, new.rank)
    out = principal_angles(old.u[:, :k], new.u[:, :k])
    into = principal_angles(old.vh[:k].T, new.vh[:k].T)
    following = old.s[k] if k < len(old.s) else 0.0 * old.s[0]
    norm = update.square().sum()
    changed = bool(norm > 0)
    rows, columns, both = _rescaling_shares(old.weight, update) if changed else (None, None, None)
    return LayerView(
        shape=(updated.shape[0], updated.shape[1]),
        top=k,
        singular_values=old.s[:k].tolist(),
        singular_values_updated=new.s[:k].tolist(),
        spectrum=_sampled(old.s),
        spectrum_updated=_sampled(new.s),
        gap=float((old.s[k - 1] - following) / old.s[0]),
        angles_out=out.tolist(),
        angles_in=into.tolist(),
        rotation_out=_rms(out),
        rotation_in=_rms(into),
        relative_update=float(norm.sqrt() / old.weight.norm()),
        update_norm=float(s[0] / old.s[0]),
        norm_ratio=float(new.s[0] / old.s[0]),
        effective_rank=effective_rank(old.s),
        effective_rank_updated=effective_rank(new.s),
        # the rounding errors of W' - W are those of W and W'
        update_rank=int((s > _noise(update, old.s[0] + new.s[0])).sum()),
        update_effective_rank=effective_rank(s),
        share_out=rows,
        share_in=columns,
        share_rescaling=both,
        share_low_rank=float(s[:k].square().sum() / norm) if changed else None,
    )


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles ``[k]`` in degrees, ascending, between the spaces of two orthonormal bases ``[n, k]``.

    Cosines are inaccurate for angles near 0, and sines near 90 degrees, so both are used (Björck and Golub, 1973).
    """
    inner = first.T @ second
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(second - first @ inner).flip(0)
    return torch.atan2(sines, cosines).rad2deg()


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of s / sum(s) (Roy and Vetterli, 2007): r for r equal values, 0 if all are zero."""
    total = singular_values.sum()
    if not bool(total > 0):
        return 0.0
    p = singular_values / total
    return float(torch.special.entr(p).sum().exp())


def scales_view(scale_out: Tensor, scale_in: Tensor) -> ScalesView:
    """Describe u ``[N, r]`` and v ``[r, K]`` (or ``[N]`` and ``[K]``) of one group of rows.

    Raises:
        ValueError: If the shapes do not multiply, or an entry is not finite.
    """
    u = scale_out.detach().to(_working_dtype(scale_out))
    v = scale_in.detach().to(_working_dtype(scale_in))
    u, v = u[:, None] if u.ndim == 1 else u, v[None] if v.ndim == 1 else v
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0]:
        raise ValueError(
            f"scale_in: expected [r, K] with scale_out [N, r], got {list(scale_in.shape)} and {list(scale_out.shape)}"
        )
    if not bool(u.isfinite().all() and v.isfinite().all()):
        raise ValueError("scale_out, scale_in: expected finite numbers, got infinite ones or NaN")
    product = u @ v
    return ScalesView(
        u=_distribution(u),
        v=_distribution(v),
        factor=_distribution(1 + product),
        rms=_rms(product),
        flipped=float((product < -1).double().mean()),
    )


def _rescaling_shares(weight: Tensor, update: Tensor) -> tuple[float, float, float]:
    """Shares of ||D||^2 in diag(a) W, in W diag(c), and in W * (a c^T)."""
    products, squares, total = update * weight, weight.square(), float(update.square().sum())

    def best(products: Tensor, squares: Tensor, other: Tensor) -> tuple[Tensor, float]:
        # the best row factor for the column factor `other` [K, 1], and the part of ||D||^2 that it explains
        along, size = products @ other, squares @ other.square()
        factor = torch.where(size > 0, along / size, 0.0)
        return factor, float((along * factor).sum())

    def alternate(rows: Tensor, gain: float) -> float:
        for _ in range(200):
            columns, _ = best(products.T, squares.T, rows)
            rows, gained = best(products, squares, columns)
            if gained - gain <= 1e-9 * total:
                return max(gain, gained)
            gain = gained
        return gain

    rows, gain_out = best(products, squares, weight.new_ones(weight.shape[1], 1))
    columns, gain_in = best(products.T, squares.T, weight.new_ones(weight.shape[0], 1))
    gain = max(alternate(rows, gain_out), alternate(*best(products, squares, columns)), gain_in)
    return gain_out / total, gain_in / total, gain / total


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.device.type == "cpu" else torch.float32


def _noise(matrix: Tensor, size: Tensor) -> Tensor:
    return size * max(matrix.shape) * torch.finfo(matrix.dtype).eps


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _sampled(values: Tensor) -> list[float]:
    last = len(values) - 1
    positions = [round(i * last / (SPECTRUM_POINTS - 1)) for i in range(SPECTRUM_POINTS)]
    return values[positions].tolist()


def _distribution(values: Tensor) -> Distribution:
    values = values.flatten()
    rising = values.sort().values
    # torch.quantile supports up to 2^24 values
    positions = [q * (len(rising) - 1) for q in QUANTILES]
    quantiles = [float(torch.lerp(rising[math.floor(p)], rising[math.ceil(p)], p % 1)) for p in positions]
    low, high = quantiles[0], quantiles[-1]
    if low == high:
        # histc treats a range of zero width as not given
        counts = [0] * _BINS
        counts[_BINS // 2] = len(values)
    else:
        counts = torch.histc(values, _BINS, low, high).int().tolist()
    return Distribution(quantiles, float(values.mean()), float(values.std(correction=0)), low, high, counts)
