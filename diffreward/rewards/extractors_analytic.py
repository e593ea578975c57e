"""Extractors that need no network: edges, thin edges, lines, coarse luma and colours.

`edges` and `lineart` take a network in their place.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from diffreward.rewards.combine import Number
from diffreward.rewards.extractors import Extractor, Network, positive, register_extractor
from diffreward.rewards.probes import luma

# --------------------------------------------------------------------------------------------
# Filters
# --------------------------------------------------------------------------------------------


def _pad(x: Float[Tensor, "b c h w"], n: int) -> Float[Tensor, "b c H W"]:
    """The edge repeated; unlike torch's, with a gradient that is deterministic on every device."""
    x = torch.cat([x[..., :1].expand(-1, -1, -1, n), x, x[..., -1:].expand(-1, -1, -1, n)], -1)
    top, bottom = x[..., :1, :], x[..., -1:, :]
    return torch.cat([top.expand(-1, -1, n, -1), x, bottom.expand(-1, -1, n, -1)], -2)


def _separable(
    x: Float[Tensor, "b 1 h w"], down: Sequence[float], along: Sequence[float]
) -> Float[Tensor, "b 1 h w"]:
    """Correlation with the outer product of two kernels of one odd length; the edge is repeated."""
    x = _pad(x, len(down) // 2)
    x = F.conv2d(x, x.new_tensor(down).view(1, 1, -1, 1))
    return F.conv2d(x, x.new_tensor(along).view(1, 1, 1, -1))


def _gaussian(sigma: Number, radius: int) -> list[float]:
    weights = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)]
    return [weight / sum(weights) for weight in weights]


_SLOPE, _SMOOTH = (-0.5, 0.0, 0.5), (0.25, 0.5, 0.25)


def sobel(grey: Float[Tensor, "b 1 h w"]) -> tuple[Tensor, Tensor]:
    """Slopes to the right and down, each ``(b, 1, h, w)``, in units per pixel; edges repeated."""
    return _separable(grey, _SMOOTH, _SLOPE), _separable(grey, _SLOPE, _SMOOTH)


@functools.lru_cache
def _steepest(sigma: Number) -> float:
    """The greatest slope that pixels in [0, 1] can have after the blur, in any direction."""
    impulse = torch.zeros(1, 1, 13, 13, dtype=torch.float64)
    impulse[..., 6, 6] = 1
    blur = _gaussian(sigma, 2)
    right, down = sobel(_separable(impulse, blur, blur))
    angles = torch.linspace(0, math.pi / 2, 181, dtype=torch.float64).view(-1, 1, 1, 1)
    return (angles.cos() * right + angles.sin() * down).clamp(min=0).sum(dim=(1, 2, 3)).max().item()


def slopes(images: Float[Tensor, "b 3 h w"], sigma: Number) -> tuple[Tensor, Tensor]:
    """Slopes of the blurred luma to the right and down, together at most 1."""
    blur = _gaussian(sigma, 2)
    right, down = sobel(_separable(luma(images)[:, None], blur, blur))
    return right / _steepest(sigma), down / _steepest(sigma)


def _length(right: Tensor, down: Tensor) -> Tensor:
    """sqrt(right^2 + down^2), rounded off at zero so that it has a gradient there."""
    return (right.square() + down.square() + 1e-6).sqrt() - 1e-3


def _beside(strength: Tensor, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The strength one step up and one down the slope, on the ring of the eight neighbours."""
    padded, (h, w) = _pad(strength, 1), strength.shape[-2:]
    at = {
        (y, x): padded[..., 1 + y : 1 + y + h, 1 + x : 1 + x + w]
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
    }
    steep, east, south = down.abs() > right.abs(), right > 0, down > 0
    small, large = torch.minimum(right.abs(), down.abs()), torch.maximum(right.abs(), down.abs())
    corner = small / (large + 1e-6)  # 0: straight ahead, 1: the diagonal neighbour

    def ahead(s: int) -> Tensor:
        upright = torch.where(south, at[s, 0], at[-s, 0])
        level = torch.where(east, at[0, s], at[0, -s])
        below = torch.where(east, at[s, s], at[s, -s])
        above = torch.where(east, at[-s, s], at[-s, -s])
        diagonal = torch.where(south, below, above)
        return torch.lerp(torch.where(steep, upright, level), diagonal, corner)

    return ahead(1), ahead(-1)


# --------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------


@register_extractor("edges", source="Sobel and Feldman 1968")
class Edges(Extractor):
    """Soft edges: the steepness of the blurred luma, or a network's.

    Luma, Gaussian of 5x5, Sobel, sqrt(right^2 + down^2 + 1e-6) - 1e-3. Divided by the steepest
    slope that there can be, so that a step from black to white is about 1.

    Args:
        model: a module or callable, pictures in [0, 1] -> edges ``(b, 1, h, w)`` in [0, 1], as HED.
        sigma: of the Gaussian.
        distance: how edges are compared, ``"mse"`` or ``"l1"``.
    """

    augmentations = ("flip", "shift")  # darker pictures have fainter edges

    def __init__(self, model: Any = None, sigma: Number = 1.0, distance: str = "mse") -> None:
        super().__init__(distance)
        positive(self.name, sigma=sigma)
        self.sigma, self.network = sigma, None
        if model is not None:
            self.network = Network(model, self.name, 1)
            self.weights, self.augmentations = self.network.weights, Extractor.augmentations

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        if self.network is not None:
            return self.network(images)
        return _length(*slopes(images, self.sigma))

    def to(self, device: torch.device | str) -> "Edges":
        if self.network is not None:
            self.network.to(device)
        return self


@register_extractor("canny", source="Canny 1986, A computational approach to edge detection")
class Canny(Extractor):
    """Thin edges: the ridges of the steepness that `edges` gives.

    Soft, with sigmoids s: s((m - (low + high) / 2) / softness) s((m - a) / softness)
    s((m - b) / softness), where m is the steepness, and a and b are those one step up and down the
    slope. Hard: m above `high`, or above `low` and connected to such a pixel, and above a and b.
    Control images are hard in either case.

    Args:
        hard: 0 or 1, without gradient: for evaluation.
        low, high: thresholds, where a step from black to white is about 1.
        sigma: of the 5x5 Gaussian.
        softness: width of the sigmoids.
        distance: how edges are compared, ``"mse"`` or ``"l1"``.
    """

    augmentations = ("flip", "shift")

    def __init__(
        self,
        hard: bool = False,
        low: Number = 0.05,
        high: Number = 0.12,
        sigma: Number = 1.0,
        softness: Number = 0.02,
        distance: str = "mse",
    ) -> None:
        super().__init__(distance)
        positive(self.name, low=low, high=high, sigma=sigma, softness=softness)
        if low > high:
            raise ValueError(
                f"low of extractor 'canny' is at most high, but low={low}, high={high} came"
            )
        self.hard, self.differentiable = hard, not hard
        self.low, self.high, self.sigma, self.softness = low, high, sigma, softness

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        if self.hard:
            edges = canny_edges(images, self.low, self.high, self.sigma)
            return edges[:, None].to(images.dtype)
        right, down = slopes(images, self.sigma)
        strength = _length(right, down)
        found = torch.sigmoid((strength - (self.low + self.high) / 2) / self.softness)
        for beside in _beside(strength, right, down):
            found = found * torch.sigmoid((strength - beside) / self.softness)
        return found

    def control(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        edges = canny_edges(images, self.low, self.high, self.sigma)
        return edges[:, None].to(images.dtype).expand(-1, 3, -1, -1)


@torch.no_grad()
def canny_edges(
    images: Float[Tensor, "b 3 h w"], low: Number = 0.05, high: Number = 0.12, sigma: Number = 1.0
) -> Bool[Tensor, "b h w"]:
    """Hard edges one pixel thin: non-maximum suppression and hysteresis; see :class:`Canny`."""
    right, down = slopes(images, sigma)
    strength = _length(right, down)
    ahead, behind = _beside(strength, right, down)
    ridge = (strength > ahead) & (strength >= behind)  # of two that are equal, one
    weak = ridge & (strength > low)
    edges = weak & (strength > high)
    while True:
        wider = (F.max_pool2d(edges.float(), 3, 1, 1) > 0) & weak
        if torch.equal(wider, edges):
            return edges[:, 0]
        edges = wider


@register_extractor("lineart", source="Marr and Hildreth 1980, Theory of edge detection")
class Lineart(Extractor):
    """Lines: where the luma is darker than around it, or a network's.

    tanh(strength max(0, G(1.6 sigma) - G(sigma))), G the luma blurred.

    Args:
        model: a module or callable, pictures in [0, 1] -> lines ``(b, 1, h, w)`` in [0, 1].
        dark_lines: the model's lines are dark on light, and are inverted.
        sigma: of the finer blur.
        strength: a line one pixel wide, black on white, is tanh(0.15 strength), for sigma 1 about.
        distance: how lines are compared, ``"mse"`` or ``"l1"``.
    """

    augmentations = ("flip", "shift")

    def __init__(
        self,
        model: Any = None,
        dark_lines: bool = False,
        sigma: Number = 1.0,
        strength: Number = 10.0,
        distance: str = "mse",
    ) -> None:
        super().__init__(distance)
        positive(self.name, sigma=sigma, strength=strength)
        self.dark_lines, self.sigma, self.strength, self.network = dark_lines, sigma, strength, None
        if model is not None:
            self.network = Network(model, self.name, 1)
            self.weights, self.augmentations = self.network.weights, Extractor.augmentations
        elif dark_lines:
            raise ValueError("dark_lines of extractor 'lineart' is about a model's, and none came")

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        if self.network is not None:
            lines = self.network(images)
            return 1 - lines if self.dark_lines else lines
        grey = luma(images)[:, None]
        radius = math.ceil(3 * 1.6 * self.sigma)
        wide, fine = (_gaussian(sigma, radius) for sigma in (1.6 * self.sigma, self.sigma))
        darker = _separable(grey, wide, wide) - _separable(grey, fine, fine)
        return torch.tanh(self.strength * F.relu(darker))

    def to(self, device: torch.device | str) -> "Lineart":
        if self.network is not None:
            self.network.to(device)
        return self


# --------------------------------------------------------------------------------------------
# Coarse luma and colours
# --------------------------------------------------------------------------------------------


class _Coarse(Extractor):
    augmentations = ("flip",)  # the grid stays where it is

    def __init__(self, cells: int = 8, distance: str = "mse") -> None:
        super().__init__(distance)
        if cells < 1:
            raise ValueError(
                f"cells of extractor {self.name!r} must be at least 1, but {cells} came"
            )
        self.cells = cells

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        values = luma(images)[:, None] if self.channels == 1 else images
        down, along = (self._averaging(side, values) for side in values.shape[-2:])
        return down @ values @ along.mT

    def target(self, control: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        return self(control)

    def _averaging(self, side: int, like: Tensor) -> Float[Tensor, "n n"]:
        """A matrix that averages over cells, each of which begins at the next whole pixel."""
        cell = torch.arange(side, device=like.device) * self.cells // side
        same = (cell[:, None] == cell).to(like.dtype)
        return same / same.sum(dim=1, keepdim=True)


@register_extractor("luma", source="this package")
class Luma(_Coarse):
    """Mean luma of each cell of a grid, at each of its pixels.

    Args:
        cells: rows and columns of the grid.
        distance: how it is compared, ``"mse"`` or ``"l1"``.
    """


@register_extractor("colour", source="this package")
class Colour(_Coarse):
    """Mean RGB of each cell of a grid, at each of its pixels; options as of ``luma``."""

    channels = 3
