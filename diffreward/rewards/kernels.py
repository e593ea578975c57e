"""Rewards of sets by kernels: maximum mean discrepancy and the Vendi score.

What they share with the others is in :mod:`.distribution`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards.base import register_reward
from diffreward.rewards.combine import positive_number
from diffreward.rewards.distribution import (
    DISTANCE,
    ENTRY,
    ROWS,
    Embed,
    FeatureReward,
    Number,
    first_order,
    load_features,
)
from diffreward.rewards.gaussians import (
    gram,
    left_vectors,
    negligible,
    remainder,
)

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Similarities (n, m) of rows (n, d) and (m, d): symmetric, positive semi-definite."""

# --------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------


def cosine(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Cosine of the angle between two rows."""
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).mT


@dataclass(frozen=True)
class RBF:
    """exp(-|x - y|^2 / (2 bandwidth^2)), the mean over several bandwidths."""

    bandwidths: tuple[Number, ...]

    def __call__(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        squares = squared_distances(x, y)
        return sum(torch.exp(-squares / (2 * b**2)) for b in self.bandwidths) / len(self.bandwidths)


@dataclass(frozen=True)
class Polynomial:
    """(gamma x . y + offset)^degree, with gamma = 1 / d by default."""

    degree: int = 3
    gamma: Number | None = None
    offset: Number = 1.0

    def __call__(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        gamma = 1 / x.shape[1] if self.gamma is None else self.gamma
        return (gamma * (x @ y.mT) + self.offset) ** self.degree


def squared_distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """|x - y|^2 of all pairs, with a gradient where they coincide."""
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * (x @ y.mT)
    return squares.clamp(min=0.0)


def median_distance(rows: Float[Tensor, "m d"], at_most: int = 1000) -> float:
    """Median distance of two rows, over ``at_most`` of them, evenly spaced.

    Raises:
        ValueError: fewer than 2 rows, or a median of 0.
    """
    some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), at_most)).long()].double()
    distances = torch.pdist(some)
    if not len(distances) or not distances.median() > 0:
        raise ValueError(
            f"{len(rows)} exemplars have no median distance above 0 that would do as bandwidth; "
            "give one"
        )
    return distances.median().item()


def _bandwidths(bandwidth: Any) -> tuple[float, ...]:
    many = bandwidth if isinstance(bandwidth, list | tuple) else [bandwidth]
    if not many:
        raise ValueError("an rbf kernel needs one bandwidth or more")
    return tuple(positive_number(each, "a bandwidth") for each in many)


# --------------------------------------------------------------------------------------------
# Maximum mean discrepancy
# --------------------------------------------------------------------------------------------

_MMD = dict(DISTANCE, range=(-math.inf, math.inf))


@register_reward("mmd", source="Gretton et al. 2012, A kernel two-sample test (eq. 3)", **_MMD)
def mmd(
    exemplars: Any,
    encoder: Any = "clip",
    kernel: Any = "rbf",
    bandwidth: Any = None,
    degree: int = 3,
    gamma: Number | None = None,
    offset: Number = 1.0,
) -> "MMD":
    """Minus the squared maximum mean discrepancy from the exemplars, unbiased.

    Args:
        exemplars: what :func:`~diffreward.rewards.exemplars.load_exemplars` takes.
        encoder: what :func:`~diffreward.rewards.encoders.make_encoder` takes.
        kernel: ``"rbf"``, ``"polynomial"``, or any callable, (n, d) and (m, d) -> (n, m).
        bandwidth: of rbf, one or a list whose kernels are averaged; by default the median distance
            of the exemplars.
        degree, gamma, offset: of polynomial, (gamma x . y + offset)^degree; gamma is 1 / d by
            default.
    """
    encoder, rows = load_features("mmd", exemplars, encoder)
    if kernel == "rbf":
        kernel = RBF(_bandwidths(median_distance(rows) if bandwidth is None else bandwidth))
    elif kernel == "polynomial":
        kernel = Polynomial(degree, gamma, offset)
    elif not callable(kernel):
        raise ValueError(f"kernel is rbf, polynomial or a callable, but {kernel!r} came")
    return MMD(encoder, rows, kernel)


@register_reward("kid", source="Binkowski et al. 2018, arXiv:1801.01401", **_MMD)
def kid(
    exemplars: Any,
    encoder: Any = "clip",
    degree: int = 3,
    gamma: Number | None = None,
    offset: Number = 1.0,
) -> "MMD":
    """mmd with the kernel (x . y / d + 1)^3: kernel inception distance, on all samples at once.

    Args:
        exemplars: what :func:`~diffreward.rewards.exemplars.load_exemplars` takes.
        encoder: what :func:`~diffreward.rewards.encoders.make_encoder` takes.
        degree, gamma, offset: see mmd.
    """
    encoder, rows = load_features("kid", exemplars, encoder)
    return MMD(encoder, rows, Polynomial(degree, gamma, offset), name="kid")


class MMD(FeatureReward):
    """Minus the unbiased estimate of the squared maximum mean discrepancy; it may come out above 0.

        mean over i != j of k(x_i, x_j) - 2 mean of k(x_i, y_j) + mean over i != j of k(y_i, y_j)

    Without a sample, the sums lose its row of kernels: the influence of all takes as long as the
    value. The exemplars' own mean is computed once.

    Args:
        encoder: ``Samples -> (b, d)``.
        exemplars: (m, d), m >= 2.
        kernel: similarities of rows.
        name: of the registry's entry.
    """

    def __init__(
        self, encoder: Embed, exemplars: Float[Tensor, "m d"], kernel: Kernel, name: str = "mmd"
    ) -> None:
        if len(exemplars) < 2:
            raise ValueError(f"{name} needs 2 exemplars or more, but {len(exemplars)} came")
        super().__init__(name, encoder, exemplars)
        self.kernel = kernel
        self._own: float | None = None

    def value(self, features: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
        among, across = self._sums(self._rows(features))
        return -self._discrepancy(among.sum(), across.sum(), len(features))

    def _influence(self, features: Tensor) -> Tensor:
        n = len(features)
        among, across = self._sums(self._rows(features))
        whole = self._discrepancy(among.sum(), across.sum(), n)
        rest = self._discrepancy(among.sum() - 2 * among, across.sum() - across, n - 1)
        return rest - whole

    def _sums(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of each sample's kernels with the other samples, and with all exemplars."""
        own = self.kernel(rows, rows)
        parts = self.exemplars.split(ROWS)
        across = sum(self.kernel(rows, part.double()).sum(dim=1) for part in parts)
        return own.sum(dim=1) - own.diagonal(), across

    def _discrepancy(self, among: Tensor, across: Tensor, n: int) -> Tensor:
        m = len(self.exemplars)
        return among / (n * (n - 1)) - 2 * across / (n * m) + self._own_mean()

    @torch.no_grad()
    def _own_mean(self) -> float:
        if self._own is None:
            rows, total = self.exemplars, 0.0
            for part in rows.split(ROWS):
                part = part.double()
                total += sum(self.kernel(part, r.double()).sum().item() for r in rows.split(ROWS))
                total -= self.kernel(part, part).diagonal().sum().item()
            self._own = total / (len(rows) * (len(rows) - 1))
        return self._own


# --------------------------------------------------------------------------------------------
# Vendi score
# --------------------------------------------------------------------------------------------


@register_reward(
    "vendi",
    of_sets=True,
    range=(1.0, math.inf),
    source="Friedman and Dieng 2022, arXiv:2210.02410; Pasarkar and Dieng 2023, arXiv:2310.12952 "
    "(orders)",
    **ENTRY,
)
def vendi(
    encoder: Any = "clip",
    kernel: Any = "cosine",
    order: Number | str = 1.0,
    log: bool = False,
    bandwidth: Any = None,
    approximate: bool = False,
) -> "Vendi":
    """Diversity as an effective number of samples, from 1 (all alike) to n (all unlike).

    Args:
        encoder: what :func:`~diffreward.rewards.encoders.make_encoder` takes.
        kernel: ``"cosine"``, ``"rbf"``, or any callable, (n, ...) and (m, ...) -> (n, m).
        bandwidth: of rbf, needed; one or a list.
        order, log, approximate: see :class:`Vendi`.
    """
    from diffreward.rewards.encoders import make_encoder

    if kernel == "cosine":
        chosen = cosine
    elif kernel == "rbf":
        if bandwidth is None:
            raise ValueError(
                "vendi with an rbf kernel needs a bandwidth, in units of the features: with one "
                "taken from the set itself, more spread would not count as more diverse"
            )
        chosen = RBF(_bandwidths(bandwidth))
    elif callable(kernel):
        chosen = kernel
    else:
        raise ValueError(f"kernel is cosine, rbf or a callable, but {kernel!r} came")
    return Vendi(make_encoder(encoder), chosen, order, log, approximate)


class Vendi(FeatureReward):
    """exp of the Renyi entropy of the eigenvalues of K / n, with K the kernels of all pairs.

    ====== ====================== =============================================
    order  value                  influence of all samples
    1      exp -sum l log l       as long as the value, :func:`entropy_without`
    2      1 / sum l^2            as long as the value
    inf    1 / max l              n eigenvalue problems
    other  (sum l^q)^(1/(1-q))    n eigenvalue problems
    ====== ====================== =============================================

    Low orders count rare kinds as much as frequent ones, high orders the frequent ones. With the
    cosine kernel and d < n, the matrices are d x d. Eigenvalues that are 0 to rounding count for
    nothing, in the gradient too: that of the features is finite.

    Args:
        encoder: ``Samples -> (b, ...)``, what the kernel takes.
        kernel: with k(x, x) = 1.
        order: q above 0, or infinity, also as ``"inf"``.
        log: the entropy itself, in nats.
        approximate: the influence to first order in a sample's weight instead: of the entropy of
            order 1, (-phi^T log(rho) phi - entropy) / n, with rho = mean of phi phi^T.

    Raises:
        ValueError: an order out of range; when called, a kernel whose diagonal is not 1, or that
            is not positive semi-definite.
    """

    def __init__(
        self,
        encoder: Embed,
        kernel: Kernel = cosine,
        order: Number | str = 1.0,
        log: bool = False,
        approximate: bool = False,
    ) -> None:
        try:
            self.order = float(order)
        except ValueError:
            self.order = math.nan
        if not self.order > 0:
            raise ValueError(f"order is a number above 0 or inf, but {order!r} came")
        limits = dict(range=(0.0, math.inf)) if log else {}
        super().__init__("vendi", encoder, **limits)
        self.kernel, self.log, self.approximate = kernel, log, approximate

    def value(self, features: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
        return self._value(features)

    def _value(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        n = len(features)
        self._check_number(n)
        if weights is None:
            weights = torch.ones(n, dtype=torch.float64, device=features.device)
        roots = (weights / weights.sum()).sqrt()[:, None]
        if self._in_features(features):
            rows = roots * self._units(features)
            values = torch.linalg.eigvalsh(gram(rows))
        else:
            values = torch.linalg.eigvalsh(roots * self._kernels(features) * roots.mT)
            self._check_spectrum(values.detach())
        values = values[values.detach() > negligible(values.detach(), n)]
        return self._of_entropy(self._entropy(values))

    def _in_features(self, features: Tensor) -> bool:
        return self.kernel is cosine and features.flatten(1).shape[1] < len(features)

    def _entropy(self, values: Float[Tensor, " r"]) -> Float[Tensor, ""]:
        if self.order == 1:
            return -(values * values.log()).sum()
        if self.order == math.inf:
            return -values.max().log()
        return values.pow(self.order).sum().log() / (1 - self.order)

    def _of_entropy(self, entropy: Tensor) -> Tensor:
        return entropy if self.log else entropy.exp()

    def _influence(self, features: Tensor) -> Tensor:
        if self.approximate:
            return first_order(lambda weights: self._value(features, weights), features)
        n = len(features)
        if self.order in (1, 2):
            left, values = self._spectrum(features)
            shares = left.square()
            if self.order == 1:
                rest = entropy_without(values, shares)
            else:
                squares = values.square().sum() - 2 * (shares @ values.square()) + 1
                rest = -(squares / (n - 1) ** 2).log()
        else:
            rest = self._entropies_without(features)
        return self._value(features) - self._of_entropy(rest)

    def _spectrum(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors (n, r) and eigenvalues above 0 of K."""
        if self.kernel is cosine:
            return left_vectors(self._units(features))
        values, vectors = torch.linalg.eigh(self._kernels(features))
        self._check_spectrum(values)
        kept = values > negligible(values, len(values))
        return vectors[:, kept], values[kept]

    def _entropies_without(self, features: Tensor) -> Float[Tensor, " n"]:
        n = len(features)
        narrow = self._in_features(features)
        matrix = self._units(features) if narrow else self._kernels(features)
        found = []
        for j in range(n):
            if narrow:
                rows = torch.cat([matrix[:j], matrix[j + 1 :]])
                rest = gram(rows)
            else:
                others = torch.arange(n, device=matrix.device) != j
                rest = matrix[others][:, others]
            values = torch.linalg.eigvalsh(rest / (n - 1))
            found.append(self._entropy(values[values > negligible(values, n)]))
        return torch.stack(found)

    def _units(self, features: Tensor) -> Float[Tensor, "n d"]:
        rows = features.flatten(1).double()
        if not rows.detach().any(dim=1).all():
            at = int((~rows.detach().any(dim=1)).nonzero()[0, 0])
            raise ValueError(
                f"reward 'vendi': the features of sample {at} are 0, without direction"
            )
        return F.normalize(rows, dim=1)

    def _kernels(self, features: Tensor) -> Float[Tensor, "n n"]:
        if self.kernel is cosine:
            rows = self._units(features)
            return rows @ rows.mT
        found = self.kernel(features.double(), features.double()).double()
        n = len(features)
        if found.shape != (n, n):
            raise ValueError(
                f"reward 'vendi': the kernel gave shape {tuple(found.shape)} for {n} samples; "
                f"expected ({n}, {n})"
            )
        if ((found - found.mT).abs() > 1e-5).any() or ((found.diagonal() - 1).abs() > 1e-5).any():
            raise ValueError(
                "reward 'vendi' needs a kernel that is symmetric, and 1 of a sample with itself"
            )
        return found

    def _check_spectrum(self, values: Tensor) -> None:
        if values.min() < -1e-5 * values.max():
            raise ValueError(
                "reward 'vendi' needs a positive semi-definite kernel, but its matrix has an "
                f"eigenvalue {values.min().item():.3g}, the largest being {values.max().item():.3g}"
            )


def entropy_without(
    values: Float[Tensor, " r"], shares: Float[Tensor, "n r"]
) -> Float[Tensor, " n"]:
    """Entropy of the eigenvalues of K / (n - 1) without row and column j of K, for each j.

    With g(t) = det(K without j + t) t / det(K + t) = sum_i u_ji^2 t / (l_i + t), and x log x
    written as an integral over x / (x + t),

        tr f(K without j) - tr f(K) = integral over t > 0 of g'(t) t / g(t) - 1 / (1 + t)

    for f(x) = x log x. In log t the integrand is analytic up to i pi and falls off as
    exp(-|log t|), so that the trapezoidal rule converges exponentially, and 140 points are exact
    to rounding.

    Args:
        values: eigenvalues l of K above 0; K has ones on its diagonal.
        shares: u_ji^2, squares of the eigenvectors' entries.
    """
    n, step, reach = len(shares), 0.5, 35.0
    scale = values.max()
    u = torch.arange(-reach, reach + step, step, dtype=values.dtype, device=values.device)
    t = scale * u.exp()
    below = values[:, None] + t
    g = remainder(shares) + shares @ (t / below)
    slope = shares @ (values[:, None] * t / below.square())  # t g'(t)
    change = step * ((slope / g - 1 / (scale + t)) @ t) - scale.log()
    return math.log(n - 1) - (torch.xlogy(values, values).sum() + change) / (n - 1)
