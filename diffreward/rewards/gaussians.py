"""Gaussians of features and the Frechet distance between them, in float64.

    d(a, b) = |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_b^1/2 C_a C_b^1/2)^1/2

(Frechet 1957; Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, as FID). The last term
is a sum over the square roots of the eigenvalues of a symmetric matrix, so it is never complex. Any
L with L L^T = C_b may stand for C_b^1/2; it is computed once for each reference, with as many
columns as C_b has rank. For n rows X in more dimensions than that, the roots are the singular
values of X L / sqrt(n - 1), X centred, and the eigenvalues are those of an n x n matrix.

Gradient: the square root has none at 0, where an eigenvalue is as soon as n <= d. As a function of
X the term is the nuclear norm of X L / sqrt(n - 1), and of its subgradients the one of least norm
is taken: eigenvalues that are zero to rounding (below max(n, d) * eps of the largest) count for
nothing, neither in the value nor in the gradient, which is finite everywhere.

Bias: the distance of n samples from a fixed reference is too large, by about c / n once n is well
above d. `frechet_infinity` takes that away (Chong and Forsyth 2020, arXiv:1911.07023).

``n`` rows, ``d`` dimensions, ``r`` the rank of the reference's covariance.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards.combine import safe_sqrt

# --------------------------------------------------------------------------------------------
# Gaussians
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and unbiased covariance of features, float64.

    Attributes:
        mean: ``(d,)``.
        covariance: ``(d, d)``, symmetric and positive semi-definite.
        count: of how many rows, 2 or more.

    Raises:
        ValueError: shapes that do not fit, a number that is not finite, fewer than 2 rows.
    """

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    count: int

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):
            tensor = getattr(self, name).double()
            if not tensor.detach().isfinite().all():
                raise ValueError(f"the {name} of a Gaussian must be finite, but NaN or inf came")
            object.__setattr__(self, name, tensor)
        d = len(self.mean)
        if self.mean.shape != (d,) or self.covariance.shape != (d, d):
            raise ValueError(
                "a Gaussian has a mean (d,) and a covariance (d, d), but shapes "
                f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)} came"
            )
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 rows or more, but {self.count} came")

    @classmethod
    def of(
        cls,
        features: Float[Tensor, "n d"],
        shrinkage: float | int = 0.0,
        weights: Float[Tensor, " n"] | None = None,
    ) -> "Gaussian":
        """The Gaussian of n rows, differentiable in them.

        Args:
            features: one row a sample, of any floating dtype.
            shrinkage: from 0 to 1, how far the covariance is drawn to a multiple of the identity
                of the same trace: (1 - shrinkage) * C + shrinkage * tr(C) / d * I.
            weights: how often each row counts; by default once.

        Raises:
            ValueError: fewer than 2 rows, a row that is not finite, or a shrinkage out of range.
        """
        mean, centred, total = _centred(features, weights)
        covariance = gram(centred) / (total - 1)
        return cls(mean, shrunk(covariance, shrinkage), len(features))

    @property
    def dimension(self) -> int:
        """d."""
        return len(self.mean)

    @cached_property
    def root(self) -> Float[Tensor, "d r"]:
        """L with L L^T = covariance and as many columns as that has rank; no gradient."""
        # Out of the caller's inference mode, in which a cached tensor would be no use elsewhere.
        with torch.inference_mode(False), torch.no_grad():
            values, vectors = torch.linalg.eigh(self.covariance.detach().clone())
            kept = values > negligible(values, self.dimension)
            return vectors[:, kept] * values[kept].sqrt()

    def to(self, device: torch.device | str) -> "Gaussian":
        """On a device, with the root if that is known."""
        mean = self.mean.to(device)
        if mean is self.mean:
            return self
        moved = Gaussian(mean, self.covariance.to(device), self.count)
        if "root" in self.__dict__:
            moved.__dict__["root"] = self.root.to(device)
        return moved


def gram(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """rows^T rows; on a CPU, and without a gradient, by numpy, whose BLAS computes half of it."""
    if rows.device.type != "cpu" or (torch.is_grad_enabled() and rows.requires_grad):
        return rows.mT @ rows
    array = rows.detach().numpy()
    return torch.from_numpy(array.T @ array)


class Moments:
    """Mean and covariance of a stream, in memory that does not grow with it.

    Sums of squares are kept about the mean of what has come so far (Chan, Golub and LeVeque 1983),
    so that features far from 0 lose no digits. No gradient.

    Args:
        chunk: rows that are converted to float64 at once.
    """

    def __init__(self, chunk: int = 4096) -> None:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, but {chunk} came")
        self.chunk = chunk
        self.count = 0
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None  # sum of (x - mean) (x - mean)^T

    @torch.no_grad()
    def update(self, features: Float[Tensor, "n d"]) -> "Moments":
        """Take in n rows, n >= 0; returns itself.

        Raises:
            ValueError: rows of another dimension than before, or that are not finite.
        """
        for part in features.split(self.chunk):
            if len(part):
                part = _checked(part)
                mean = part.mean(dim=0)
                centred = part - mean
                self._join(len(part), mean, gram(centred))
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Take in what another one has seen; returns itself."""
        if other.count:
            self._join(other.count, other.mean, other.scatter)
        return self

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.mean is None:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self.mean.shape:
            raise ValueError(
                f"features of {len(mean)} dimensions cannot join those of {len(self.mean)}: "
                "are they from the same encoder?"
            )
        total = self.count + count
        step = mean.to(self.mean) - self.mean
        self.scatter += scatter.to(self.scatter)
        self.scatter.addr_(step, step, alpha=self.count * count / total)
        self.mean += step * (count / total)
        self.count = total

    def gaussian(self, shrinkage: float | int = 0.0) -> Gaussian:
        """Of all rows so far; see :meth:`Gaussian.of`.

        Raises:
            ValueError: fewer than 2 rows came.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 rows or more, but {self.count} came")
        covariance = self.scatter / (self.count - 1)
        return Gaussian(self.mean.clone(), shrunk(covariance, shrinkage), self.count)


def shrunk(covariance: Float[Tensor, "*b d d"], shrinkage: float | int) -> Float[Tensor, "*b d d"]:
    """Drawn to a multiple of the identity of the same trace; see :meth:`Gaussian.of`."""
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage is a number from 0 to 1, but {shrinkage} came")
    if shrinkage == 0:
        return covariance
    trace = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    identity = torch.eye(covariance.shape[-1]).to(covariance)
    return (1 - shrinkage) * covariance + shrinkage * trace[..., None, None] * identity


# --------------------------------------------------------------------------------------------
# The distance
# --------------------------------------------------------------------------------------------


def frechet_distance(a: Gaussian, b: Gaussian) -> Float[Tensor, ""]:
    """Squared Frechet (Wasserstein-2) distance, differentiable in ``a``.

    Args:
        a: on the device of b.
        b: the reference, whose :attr:`~Gaussian.root` is computed on the first call and kept.

    Raises:
        ValueError: different dimensions, or a reference that requires a gradient.
    """
    _check_reference(b, a.dimension)
    roots = root_trace(_symmetric(b.root.mT @ a.covariance @ b.root), max(a.count, a.dimension))
    return _distance(a.mean, a.covariance.trace(), roots, b)


def frechet_of(
    features: Float[Tensor, "*b n d"],
    reference: Gaussian,
    shrinkage: float | int = 0.0,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " *b"]:
    """Distance of the Gaussian of n rows from a reference, differentiable in the rows.

    The same as ``frechet_distance(Gaussian.of(features), reference)``, without a d x d covariance
    where n is below the rank of the reference.

    Args:
        features: one set of rows, or any number of such sets.
        reference: on the device of the features.
        shrinkage, weights: see :meth:`Gaussian.of`.

    Raises:
        ValueError: as of :meth:`Gaussian.of` and :func:`frechet_distance`.
    """
    n, d = features.shape[-2:]
    _check_reference(reference, d)
    mean, centred, total = _centred(features, weights)
    scale = total - 1
    if shrinkage == 0 and n < reference.root.shape[1]:
        rows = centred @ reference.root
        product = rows @ rows.mT / scale
        trace = centred.square().sum(dim=(-2, -1)) / scale
    else:
        covariance = shrunk(centred.mT @ centred / scale, shrinkage)
        product = reference.root.mT @ covariance @ reference.root
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return _distance(mean, trace, root_trace(_symmetric(product), max(n, d)), reference)


def root_trace(matrix: Float[Tensor, "*b k k"], size: int) -> Float[Tensor, " *b"]:
    """Trace of the square root of a symmetric positive semi-definite matrix.

    Eigenvalues below ``size`` * eps of the largest are taken for 0, in the gradient too.
    """
    values = torch.linalg.eigvalsh(matrix)
    zero = values <= negligible(values.detach(), size)
    return safe_sqrt(values.masked_fill(zero, 0.0)).sum(dim=-1)


def _distance(mean: Tensor, trace: Tensor, roots: Tensor, reference: Gaussian) -> Tensor:
    apart = (mean - reference.mean).square().sum(dim=-1)
    # Of equal Gaussians, rounding may leave less than nothing.
    return (apart + trace + reference.covariance.trace() - 2 * roots).clamp(min=0.0)


# --------------------------------------------------------------------------------------------
# Without one row; without bias
# --------------------------------------------------------------------------------------------


@torch.no_grad()
def frechet_without(
    features: Float[Tensor, "n d"], reference: Gaussian, shrinkage: float | int = 0.0
) -> Float[Tensor, " n"]:
    """Distance of the rows without row j, for each j; exact, no gradient.

    Without shrinkage in O(n d^2 + d^3) for all rows together, where recomputing takes O(n d^3):
    leaving a row out takes a matrix of rank one from the covariance, and what that does to the
    trace of the square root is an integral, see :func:`root_trace_without`. With shrinkage, n
    symmetric eigenvalue problems, a few at a time.

    Raises:
        ValueError: fewer than 3 rows; and as of :func:`frechet_of`.
    """
    n, d = features.shape
    if n < 3:
        raise ValueError(f"leaving one row out needs 3 rows or more, but {n} came")
    _check_reference(reference, d)
    mean, centred, _ = _centred(features, None)
    squares = centred.square().sum(dim=1)
    means = mean - centred / (n - 1)
    traces = (squares.sum() - n / (n - 1) * squares) / (n - 2)
    if shrinkage == 0:
        left, values = left_vectors(centred @ reference.root)
        # Without row j, the scatter loses n / (n - 1) of x_j x_j^T, x_j centred.
        roots = root_trace_without(values, n / (n - 1) * left.square()) / math.sqrt(n - 2)
    else:
        scatter, roots = gram(centred), []
        for rows in centred.split(max(1, 2**22 // d**2)):
            less = n / (n - 1) * rows[:, :, None] * rows[:, None, :]
            covariance = shrunk((scatter - less) / (n - 2), shrinkage)
            product = _symmetric(reference.root.mT @ covariance @ reference.root)
            roots.append(root_trace(product, max(n, d)))
        roots = torch.cat(roots)
    return _distance(means, traces, roots, reference)


def root_trace_without(
    values: Float[Tensor, " r"], weights: Float[Tensor, "n r"]
) -> Float[Tensor, " n"]:
    """Trace of the square root of A - a_j a_j^T, for each j, from the eigenvalues of A.

    With det(A - a a^T + t) / det(A + t) = 1 - a^T (A + t)^-1 a = g(t), and the square root written
    as an integral over log(x + s^2),

        tr (A - a a^T)^1/2 - tr A^1/2 = 1/pi * integral over s > 0 of log g(s^2).

    In log s the integrand is analytic up to i pi/2 and falls off as exp(-|log s|), so that the
    trapezoidal rule converges exponentially: 1e-13 of the largest root with 230 points.

    Args:
        values: eigenvalues of A, above 0.
        weights: (a_j . v_i)^2 / values[i] for the eigenvectors v_i; rows sum to 1 at most.
    """
    if not len(values):
        return weights.sum(dim=1)
    step, reach = 0.3, 34.0
    u = torch.arange(-reach, reach + step, step, dtype=values.dtype, device=values.device)
    s = values.max().sqrt() * u.exp()
    below = values[:, None] + s**2
    # Both are log g. Below the largest eigenvalue g may vanish, above it log g; neither cancels.
    low, high = u < 0, u >= 0
    log_g = torch.empty(len(weights), len(s), dtype=values.dtype, device=values.device)
    log_g[:, low] = (remainder(weights) + weights @ (s**2 / below)[:, low]).log()
    log_g[:, high] = torch.log1p(-(weights @ (values[:, None] / below)[:, high]))
    return values.sqrt().sum() + step / math.pi * (log_g @ s)


def frechet_infinity(
    features: Float[Tensor, "n d"],
    reference: Gaussian,
    shrinkage: float | int = 0.0,
    levels: int = 4,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """The distance extrapolated to infinitely many rows, differentiable; may come out below 0.

    A straight line in 1 / n through the distance of all rows and the mean distances of their
    halves, thirds, ..., ``levels``-ths; its value at 0 (Chong and Forsyth 2020, arXiv:1911.07023,
    who draw 15 random subsets). Each row is in one part of each level, so all count alike. The
    parts are drawn with a fixed seed from the rows in the order of a projection, and so do not
    depend on the order in which the rows come. The bias of the reference's own finite size stays.

    Raises:
        ValueError: fewer than 2 levels, parts of fewer than 2 rows, and as of :func:`frechet_of`.
    """

    def distance(rows: Tensor) -> Tensor:
        counts = None if weights is None else weights[rows]
        return frechet_of(features[rows], reference, shrinkage, counts)

    parts, slopes = extrapolation(features, levels)
    means = [torch.stack([distance(rows) for rows in level]).mean() for level in parts]
    return sum(slope * mean for slope, mean in zip(slopes, means, strict=True))


def extrapolation(
    features: Float[Tensor, "n d"], levels: int
) -> tuple[list[list[Tensor]], list[float]]:
    """The rows in each part of each level of :func:`frechet_infinity`, and the levels' factors."""
    n, d = features.shape
    if levels < 2:
        raise ValueError(f"an extrapolation needs 2 levels or more, but {levels} came")
    if n < 2 * levels:
        raise ValueError(
            f"extrapolating over {levels} levels needs {2 * levels} rows or more, but {n} came"
        )
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(d, generator=generator, dtype=torch.float64)
    order = (features.detach().double().cpu() @ direction).argsort(stable=True)
    parts = []
    for level in range(1, levels + 1):
        shuffled = order[torch.randperm(n, generator=generator)]
        parts.append([rows.to(features.device) for rows in shuffled.tensor_split(level)])
    # Least squares: the intercept is linear in the distances.
    sizes = [sum(1 / len(rows) for rows in level) / len(level) for level in parts]
    at = torch.tensor(sizes, dtype=torch.float64)
    slopes = (at - at.mean()) / (at - at.mean()).square().sum()
    return parts, (1 / levels - at.mean() * slopes).tolist()


# --------------------------------------------------------------------------------------------
# Linear algebra
# --------------------------------------------------------------------------------------------


def _centred(features: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean, centred rows times the root of their weights, and the sum of the weights."""
    x = _checked(features)
    n = x.shape[-2]
    if n < 2:
        raise ValueError(f"a covariance needs 2 rows or more, but {n} came")
    if weights is None:
        mean = x.mean(dim=-2)
        return mean, x - mean[..., None, :], n
    w = weights.to(x)
    total = w.sum()
    mean = w @ x / total
    return mean, (x - mean[..., None, :]) * w.sqrt()[:, None], total


def _checked(features: Tensor) -> Tensor:
    """Float64 rows; an error for those that are no numbers."""
    if features.ndim < 2:
        raise ValueError(
            f"features are rows (n, d), one for each sample, but shape {tuple(features.shape)} came"
        )
    if not features.detach().isfinite().all():
        raise ValueError("features must be finite, but NaN or inf came")
    return features.double()


def _check_reference(reference: Gaussian, d: int) -> None:
    if reference.dimension != d:
        raise ValueError(
            f"features of {d} dimensions cannot be compared with a reference of "
            f"{reference.dimension}: are both from the same encoder?"
        )
    if reference.covariance.requires_grad or reference.mean.requires_grad:
        raise ValueError(
            "the second Gaussian is the reference and gets no gradient, but it requires one; "
            "exchange the two (the distance is symmetric), or detach it"
        )


def left_vectors(rows: Float[Tensor, "n k"]) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Left singular vectors of a matrix and its squared singular values, those above 0."""
    n, k = rows.shape
    if n <= k:
        values, left = torch.linalg.eigh(rows @ rows.mT)
        kept = values > negligible(values, k)
        return left[:, kept], values[kept]
    values, right = torch.linalg.eigh(gram(rows))
    kept = values > negligible(values, n)
    return rows @ right[:, kept] / values[kept].sqrt(), values[kept]


def remainder(weights: Float[Tensor, "n r"]) -> Float[Tensor, "n 1"]:
    """1 - the sum of each row; 0 where that is nothing but rounding."""
    rest = 1 - weights.sum(dim=1, keepdim=True)
    noise = 8 * weights.shape[1] * torch.finfo(weights.dtype).eps
    return rest.masked_fill(rest < noise, 0.0)


def negligible(values: Float[Tensor, "*b k"], size: int) -> Float[Tensor, "*b 1"]:
    """The eigenvalue below which, for a matrix of this size, there is only rounding."""
    largest = values.amax(dim=-1, keepdim=True) if values.shape[-1] else values.sum(-1, True)
    return largest.clamp(min=0.0) * size * torch.finfo(values.dtype).eps


def _symmetric(matrix: Float[Tensor, "*b k k"]) -> Float[Tensor, "*b k k"]:
    return (matrix + matrix.mT) / 2
