"""Rewards of sets by nearest neighbours: precision, recall, density and coverage.

What they share with the others is in :mod:`.distribution`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffreward.rewards.base import register_reward
from diffreward.rewards.distribution import ENTRY, ROWS, Embed, FeatureReward, load_features

# --------------------------------------------------------------------------------------------
# Nearest neighbours
# --------------------------------------------------------------------------------------------

_KYNKAANNIEMI = "Kynkaanniemi et al. 2019, arXiv:1904.06991"
_NAEEM = "Naeem et al. 2020, arXiv:2002.09797"


def _register(name: str, source: str, most: float = 1.0) -> Callable:
    limits = dict(range=(0.0, most), of_sets=True, differentiable=False)
    return register_reward(name, source=source, **limits, **ENTRY)


@_register("precision", _KYNKAANNIEMI)
def precision(exemplars: Any, encoder: Any = "clip", k: int = 3) -> "Neighbours":
    """Share of samples that lie within reach of an exemplar: how good they are.

    An exemplar reaches as far as its k-th nearest other exemplar.

    Args:
        exemplars: what :func:`~diffreward.rewards.exemplars.load_exemplars` takes.
        encoder: what :func:`~diffreward.rewards.encoders.make_encoder` takes.
        k: how many neighbours are reached.
    """
    return Neighbours("precision", *load_features("precision", exemplars, encoder), k)


@_register("recall", _KYNKAANNIEMI)
def recall(exemplars: Any, encoder: Any = "clip", k: int = 3) -> "Neighbours":
    """Share of exemplars that lie within reach of a sample: how much of them there is.

    A sample reaches as far as its k-th nearest other sample.

    Args:
        exemplars: what :func:`~diffreward.rewards.exemplars.load_exemplars` takes.
        encoder: what :func:`~diffreward.rewards.encoders.make_encoder` takes.
        k: how many neighbours are reached.
    """
    return Neighbours("recall", *load_features("recall", exemplars, encoder), k)


@_register("density", f"{_NAEEM} (eq. 4)", most=math.inf)
def density(exemplars: Any, encoder: Any = "clip", k: int = 5) -> "Neighbours":
    """How many exemplars reach a sample, a k-th of the mean: precision, less led by outliers.

    An exemplar reaches as far as its k-th nearest other exemplar.

    Args:
        exemplars: what :func:`~diffreward.rewards.exemplars.load_exemplars` takes.
        encoder: what :func:`~diffreward.rewards.encoders.make_encoder` takes.
        k: how many neighbours are reached.
    """
    return Neighbours("density", *load_features("density", exemplars, encoder), k)


@_register("coverage", f"{_NAEEM} (eq. 5)")
def coverage(exemplars: Any, encoder: Any = "clip", k: int = 5) -> "Neighbours":
    """Share of exemplars that reach a sample: recall, less led by outliers.

    An exemplar reaches as far as its k-th nearest other exemplar.

    Args:
        exemplars: what :func:`~diffreward.rewards.exemplars.load_exemplars` takes.
        encoder: what :func:`~diffreward.rewards.encoders.make_encoder` takes.
        k: how many neighbours are reached.
    """
    return Neighbours("coverage", *load_features("coverage", exemplars, encoder), k)


class Neighbours(FeatureReward):
    """Precision, recall, density or coverage by nearest neighbours; without gradient.

    A ball around a point reaches to its k-th nearest neighbour of its own set, the point itself
    not counted, and includes its surface. The influence of all samples takes about as long as the
    value, for recall about k times as long.

    Args:
        name: which of them.
        encoder: ``Samples -> (b, d)``.
        exemplars: (m, d), m > k.
        k: 1 or more.
    """

    def __init__(
        self, name: str, encoder: Embed, exemplars: Float[Tensor, "m d"], k: int = 3
    ) -> None:
        if k < 1:
            raise ValueError(f"{name} needs k of 1 or more, but {k} came")
        if len(exemplars) <= k and name != "recall":
            raise ValueError(
                f"{name} with k = {k} needs {k + 1} exemplars or more, but {len(exemplars)} came"
            )
        super().__init__(name, encoder, exemplars)
        self.k = k
        self.min_samples = max(2, k + 1) if name == "recall" else 2
        self._reach: Tensor | None = None

    @torch.no_grad()
    def value(self, features: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
        rows = self._rows(features)
        if self.info.name == "recall":
            near = self._distances(rows) <= _neighbour(torch.cdist(rows, rows), self.k)[:, None]
            return near.any(dim=0).double().mean()
        reached = self._distances(rows) <= self._radii()
        if self.info.name == "coverage":
            return reached.any(dim=0).double().mean()
        return self._shares(reached).mean()

    def _influence(self, features: Tensor) -> Tensor:
        rows = self._rows(features)
        n, m = len(rows), len(self.exemplars)
        if self.info.name == "recall":
            return self._recall_influence(rows)
        reached = self._distances(rows) <= self._radii()
        if self.info.name == "coverage":  # what no other sample covers
            return (reached & (reached.sum(dim=0) == 1)).sum(dim=1).double() / m
        each = self._shares(reached)
        return each.mean() - (each.sum() - each) / (n - 1)

    def _shares(self, reached: Bool[Tensor, "n m"]) -> Float[Tensor, " n"]:
        """Of each sample in precision or density, which are their mean."""
        if self.info.name == "precision":
            return reached.any(dim=1).double()
        return reached.sum(dim=1).double() / self.k

    def _recall_influence(self, rows: Tensor) -> Tensor:
        """Without sample j, its own ball is gone, and of those that counted it one more is in."""
        among, distances = torch.cdist(rows, rows), self._distances(rows)
        before = _neighbour(among, self.k)[:, None]
        after = _neighbour(among, self.k + 1)[:, None]
        near = distances <= before
        grown = (distances <= after) & ~near  # what a ball that has lost a member reaches beyond
        times, found = near.sum(dim=0), []
        for j in range(len(rows)):
            larger = among[:, j] <= before[:, 0]
            larger[j] = False
            rest = (times > near[j]) | grown[larger].any(dim=0)
            found.append((times > 0).sum() - rest.sum())
        return torch.stack(found).double() / len(self.exemplars)

    def _distances(self, rows: Tensor) -> Float[Tensor, "n m"]:
        parts = self.exemplars.split(ROWS)
        return torch.cat([torch.cdist(rows, part.double()) for part in parts], dim=1)

    def _radii(self) -> Float[Tensor, " m"]:
        if self._reach is None:
            rows = self.exemplars.double()
            parts = torch.arange(len(rows)).split(ROWS)
            self._reach = torch.cat([_neighbour(torch.cdist(rows[p], rows), self.k) for p in parts])
        self._reach = self._reach.to(self.exemplars.device)
        return self._reach


def _neighbour(distances: Float[Tensor, "a b"], k: int) -> Float[Tensor, " a"]:
    """Distance of the k-th nearest other point; the point itself is the nearest."""
    return distances.kthvalue(k + 1, dim=1).values
