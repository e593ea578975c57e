"""Judges of how well pictures keep their condition: hard, without gradient, as published tables.

Optimise :mod:`.control`'s rewards and judge by these, with another extractor where there is one: a
reader that was optimised is no judge. Each is a pure function and a reward.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffreward.rewards.base import register_reward
from diffreward.rewards.combine import Number
from diffreward.rewards.control import CONTROL, make_extractor, read_control
from diffreward.rewards.extractors import ExtractorSpec
from diffreward.rewards.extractors_analytic import canny_edges
from diffreward.rewards.extractors_learnt import IGNORED
from diffreward.samples import Samples

_JUDGE = dict(
    modality="image",
    differentiable=False,
    needs_context=(CONTROL,),
    licence="Apache-2.0; a model has its own",
)

# --------------------------------------------------------------------------------------------
# Functions
# --------------------------------------------------------------------------------------------


def mean_iou(
    labels: Int[Tensor, "b h w"], target: Int[Tensor, "b h w"], classes: int
) -> Float[Tensor, " b"]:
    """Mean intersection over union of each picture, over the classes in either map.

    Published tables mostly add up intersections and unions over a whole data set instead.

    Args:
        labels: 0 .. classes - 1.
        target: the same, or -1: the pixel does not count.
        classes: how many there are.

    Returns:
        In [0, 1]; NaN where no pixel counts.

    Raises:
        ValueError: a label out of range.
    """
    counts = target != IGNORED
    for what, these in (("labels", labels), ("target", target[counts])):
        if these.numel() and not (0 <= int(these.min()) and int(these.max()) < classes):
            raise ValueError(
                f"{what} are in 0 .. {classes - 1}, but {int(these.min())} .. {int(these.max())} "
                "came"
            )
    cell = (labels * classes + target).masked_fill(~counts, classes**2).flatten(1)
    table = cell.new_zeros(len(cell), classes**2 + 1)
    table = table.scatter_add(1, cell, torch.ones_like(cell))[:, :-1].view(-1, classes, classes)
    both = table.diagonal(dim1=1, dim2=2)
    either = table.sum(dim=1) + table.sum(dim=2) - both
    present = either > 0
    return (both / either.clamp(min=1)).sum(dim=1) / present.sum(dim=1)


def edge_f1(
    edges: Bool[Tensor, "b h w"], target: Bool[Tensor, "b h w"], tolerance: int = 1
) -> Float[Tensor, " b"]:
    """F1 of edge pixels: a pixel is right if the other map has one within ``tolerance``.

    2 P R / (P + R), P the share of ``edges`` that is right, R that of ``target``. The distance is
    that along rows or along columns, the larger of the two: with 1, the eight neighbours are near.
    1 where neither map has an edge, 0 where only one has.

    Raises:
        ValueError: a negative tolerance.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is in whole pixels, 0 or more, but {tolerance} came")

    def share(these: Tensor, those: Tensor) -> Tensor:
        near = F.max_pool2d(those[:, None].float(), 2 * tolerance + 1, 1, tolerance)[:, 0] > 0
        right = (these & near).flatten(1).sum(dim=1)
        return right / these.flatten(1).sum(dim=1).clamp(min=1)

    precision, recall = share(edges, target), share(target, edges)
    total = precision + recall
    f1 = 2 * precision * recall / total.masked_fill(total == 0, 1)
    neither = ~(edges | target).flatten(1).any(dim=1)
    return f1.masked_fill(neither, 1)


def ssim(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity (Wang et al. 2004) of images in [0, 1], averaged over channels.

    Gaussian window of 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03; windows lie within the image.

    Raises:
        ValueError: a side is shorter than the window.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(
            f"SSIM's window is 11x11, but images of {a.shape[-2]}x{a.shape[-1]} came; a smaller "
            "window would give other numbers: use larger pictures, or rmse"
        )
    (h, w), exact = a.shape[-2:], a.dtype if a.dtype == torch.float64 else torch.float32
    a, b = a.to(exact), b.to(exact)
    weights = torch.arange(-5, 6, device=a.device, dtype=exact).square().div(-4.5).exp()
    weights = weights / weights.sum()

    def mean(x: Tensor) -> Tensor:
        x = F.conv2d(x.reshape(-1, 1, h, w), weights.view(1, 1, -1, 1))
        return F.conv2d(x, weights.view(1, 1, 1, -1))

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2
    covariance = mean(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mu_a * mu_b + c1) * (2 * covariance + c2)
    found = found / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return found.view(len(a), -1).mean(dim=1)


def rmse(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Root mean square difference of images in [0, 1], in units of 0 .. 255."""
    return 255 * (a - b).square().flatten(1).mean(dim=1).sqrt()


# --------------------------------------------------------------------------------------------
# Rewards
# --------------------------------------------------------------------------------------------


@register_reward(
    "control_miou", range=(0.0, 1.0), source="Everingham et al. 2010, PASCAL VOC", **_JUDGE
)
def control_miou(extractor: ExtractorSpec = "segmentation") -> Callable[[Samples], Tensor]:
    """Mean IoU of the picture's likeliest classes and those of the control image.

    Args:
        extractor: a segmentation, with the palette of the control images.
    """
    reader = make_extractor(extractor)
    if not reader.probabilistic:
        raise ValueError(
            f"control_miou compares classes, and extractor {reader.name!r} reads none; give a "
            "segmentation"
        )

    @torch.no_grad()
    def score(samples: Samples) -> Tensor:
        target = reader.target(read_control(samples, "reward 'control_miou'"))
        empty = (target == IGNORED).flatten(1).all(dim=1)
        if empty.any():
            raise ValueError(
                f"no pixel of control image {int(empty.nonzero()[0, 0])} has a colour of extractor "
                f"{reader.name!r}'s palette: give the extractor the palette that it was drawn with"
            )
        logits = reader(samples.data)
        return mean_iou(logits.argmax(dim=1), target, logits.shape[1])

    return score


@register_reward(
    "control_edge_f1",
    range=(0.0, 1.0),
    source="Martin et al. 2004, Learning to detect natural image boundaries (F); Canny 1986",
    **_JUDGE,
)
def control_edge_f1(
    tolerance: int = 1, low: Number = 0.05, high: Number = 0.12, sigma: Number = 1.0
) -> Callable[[Samples], Tensor]:
    """F1 of the picture's hard edges and the control image's, the pixels of 0.5 or more.

    Args:
        tolerance: see :func:`edge_f1`.
        low, high, sigma: see :class:`~diffreward.rewards.extractors_analytic.Canny`.
    """
    make_extractor("canny", low=low, high=high, sigma=sigma)  # checks them
    if tolerance < 0:
        raise ValueError(f"tolerance is in whole pixels, 0 or more, but {tolerance} came")

    @torch.no_grad()
    def score(samples: Samples) -> Tensor:
        control = read_control(samples, "reward 'control_edge_f1'").mean(dim=1)
        return edge_f1(canny_edges(samples.data, low, high, sigma), control >= 0.5, tolerance)

    return score


@register_reward(
    "control_ssim",
    range=(-1.0, 1.0),
    source="Wang et al. 2004, Image quality assessment: from error visibility to structural "
    "similarity",
    **_JUDGE,
)
def control_ssim(extractor: ExtractorSpec = "edges") -> Callable[[Samples], Tensor]:
    """SSIM of the control image that is read off the picture and its own.

    Args:
        extractor: what reads it.
    """
    return _of_control_images(extractor, "control_ssim", ssim)


@register_reward("control_rmse", range=(-255.0, 0.0), source="this package", **_JUDGE)
def control_rmse(extractor: ExtractorSpec = "luma") -> Callable[[Samples], Tensor]:
    """Minus the RMSE of the control image read off the picture and its own, in 0 .. 255.

    Args:
        extractor: what reads it; a `depth` reads maps from 0 to 255 in each picture.
    """
    return _of_control_images(extractor, "control_rmse", lambda a, b: -rmse(a, b))


def _of_control_images(
    extractor: ExtractorSpec, name: str, compare: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Samples], Tensor]:
    reader = make_extractor(extractor)
    channels = slice(None) if reader.channels == 3 else slice(1)

    @torch.no_grad()
    def score(samples: Samples) -> Tensor:
        own = read_control(samples, f"reward {name!r}")
        if reader.channels == 1:
            own = own.mean(dim=1, keepdim=True)
        return compare(reader.control(samples.data)[:, channels], own)

    return score
