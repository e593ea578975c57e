"""Extractors that ask a network: segmentation, depth, pose. The first also does without one."""

import colorsys
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diffreward.rewards.combine import Number
from diffreward.rewards.extractors import Extractor, Map, Network, positive, register_extractor
from diffreward.rewards.shapes import COLOURS

IGNORED = -1
"""The label of pixels that do not count."""


@register_extractor("segmentation", source="this package; palette after Everingham et al. 2010")
class Segmentation(Extractor):
    """Classes of pixels: logits. Compared by cross-entropy, and with each other by KL.

    Control images show each class in its colour of the palette. A pixel of one that is farther
    than ``tolerance`` from all of them has no label and does not count.

    Args:
        model: ``"shapes_colours"``: which colour of the palette is near, without a network, by
            default those of the embedded scenes and their white background; a folder or hub id of
            transformers (any semantic segmentation); or a module or callable, pictures in [0, 1]
            -> logits ``(b, classes, h', w')``.
        palette: an RGB colour in 0 .. 255 for each class; ``"shapes"``: white and the colours of
            the embedded scenes, the default of shapes_colours; ``"voc"``: PASCAL VOC's, which
            starts with black, the default of others.
        classes: how many, where neither the palette nor the model's config says so.
        temperature: of shapes_colours: logits are -(distance in RGB in [0, 1])^2 / temperature.
        tolerance: distance in RGB in [0, 1]; by default 0.1, at most half the smallest between two
            colours of the palette.
        size: height and width at which the network sees pictures; ``"picture"``: their own. By
            default transformers' image processor's, for others their own.

    Raises:
        FileNotFoundError, TypeError, ValueError: see :class:`Network`.
        ValueError: the palette has another number of colours than there are classes.
    """

    channels, probabilistic = 3, True

    def __init__(
        self,
        model: str | Callable = "shapes_colours",
        palette: str | Sequence[Sequence[Number]] | None = None,
        classes: int | None = None,
        temperature: Number = 0.02,
        tolerance: Number | None = None,
        size: Sequence[int] | str | None = None,
    ) -> None:
        super().__init__()
        positive(self.name, temperature=temperature)
        self.temperature, self.network = temperature, None
        if model == "shapes_colours":
            palette = "shapes" if palette is None else palette
        else:
            self.network = Network(
                model, self.name, None, "AutoModelForSemanticSegmentation", "logits", size
            )
            self.weights = self.network.weights
            config = getattr(self.network.model, "config", None)
            classes = classes or getattr(config, "num_labels", None)
        if palette in (None, "voc"):
            if classes is None:
                raise ValueError(
                    "extractor 'segmentation' needs to know how many classes its model has: give "
                    "classes, or a palette with a colour for each"
                )
            self.palette = palette_of(classes)
        else:
            self.palette = _colours(palette)
        if classes is not None and len(self.palette) != classes:
            raise ValueError(
                f"the palette of extractor 'segmentation' has {len(self.palette)} colours, but the "
                f"model has {classes} classes; give one colour for each"
            )
        apart = torch.pdist(self.palette).min().item() if len(self.palette) > 1 else math.inf
        self.tolerance = min(0.1, apart / 2) if tolerance is None else tolerance
        positive(self.name, tolerance=self.tolerance)

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        if self.network is None:
            return -self._distances(images) / self.temperature
        logits = self.network(images)
        if logits.shape[1] != len(self.palette):
            raise ValueError(
                f"the model of extractor 'segmentation' gave logits of {logits.shape[1]} classes, "
                f"but its palette has {len(self.palette)} colours; give one colour for each class"
            )
        return logits

    def _distances(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        colours = self.palette.to(images).view(-1, 3, 1, 1)
        return torch.stack([(images - colour).square().sum(dim=1) for colour in colours], dim=1)

    def control(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return self.paint(self(images).argmax(dim=1)).to(images.dtype)

    def paint(self, labels: Int[Tensor, "b h w"]) -> Float[Tensor, "b 3 h w"]:
        """Labels in the colours of the palette."""
        return self.palette.to(labels.device)[labels].permute(0, 3, 1, 2)

    @torch.no_grad()
    def target(self, control: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b h w"]:
        nearest, labels = None, None
        for label, colour in enumerate(self.palette.to(control)):  # one by one: there may be many
            distance = (control - colour.view(3, 1, 1)).square().sum(dim=1)
            if nearest is None:
                nearest, labels = distance, torch.zeros_like(distance, dtype=torch.long)
            else:
                labels = labels.masked_fill(distance < nearest, label)
                nearest = torch.minimum(nearest, distance)
        return labels.masked_fill(nearest > self.tolerance**2, IGNORED)

    def loss(self, prediction: Float[Tensor, "b c h w"], target: Int[Tensor, "b h w"]) -> Map:
        _check_labels(target, prediction.shape[1])
        return F.cross_entropy(prediction, target, ignore_index=IGNORED, reduction="none")

    def divergence(self, second: Float[Tensor, "b c h w"], first: Float[Tensor, "b c h w"]) -> Map:
        """KL(second || first) of the classes' probabilities, in nats."""
        log_q, log_p = (F.log_softmax(logits, dim=1) for logits in (second, first))
        return (log_q.exp() * (log_q - log_p)).sum(dim=1)

    def to(self, device: torch.device | str) -> "Segmentation":
        if self.network is not None:
            self.network.to(device)
        return self


def palette_of(classes: int) -> Float[Tensor, "n 3"]:
    """PASCAL VOC's colours in [0, 1], at most 256: bits of the label, spread over R, G and B.

    Raises:
        ValueError: more classes than colours.
    """
    if not 1 <= classes <= 256:
        raise ValueError(
            f"the default palette has 256 colours, but there are {classes} classes; give a palette"
        )
    label = torch.arange(classes)
    bits = [[(label >> (3 * place + channel)) & 1 for place in range(3)] for channel in range(3)]
    levels = [sum(bit << (7 - place) for place, bit in enumerate(some)) for some in bits]
    return torch.stack(levels, dim=1).float() / 255


def _colours(palette: Any) -> Float[Tensor, "n 3"]:
    if palette == "shapes":
        palette = [(255, 255, 255), *COLOURS.values()]
    elif isinstance(palette, str):
        raise ValueError(f"a palette is 'shapes', 'voc' or a list of colours, but {palette!r} came")
    colours = torch.as_tensor(palette, dtype=torch.float32)
    if colours.ndim != 2 or colours.shape[1] != 3 or not len(colours):
        raise ValueError(
            f"a palette has three numbers for each class, but the shape {tuple(colours.shape)} came"
        )
    if not ((colours >= 0) & (colours <= 255)).all():
        raise ValueError("colours of a palette are in 0 .. 255")
    if len(colours.unique(dim=0)) < len(colours):
        raise ValueError("two classes of a palette have the same colour")
    return colours / 255


def _check_labels(target: Int[Tensor, "b h w"], classes: int) -> None:
    highest = int(target.max())
    if highest >= classes:
        raise ValueError(
            f"the target has the label {highest}, but the prediction has logits of {classes} "
            f"classes, 0 to {classes - 1}; the palette must be that of the model"
        )


@register_extractor("depth", weights="a depth model, to be named",
                    source="Ranftl et al. 2020 (MiDaS), arXiv:1907.01341 (eq. 5 to 7)")  # fmt: skip
class Depth(Extractor):
    """Relative inverse depth: near is large. Compared up to scale and shift.

    Both maps are aligned, each by itself: d -> (d - t) / s, t its median, s the mean of |d - t|. So
    a map and a d + b are the same for a > 0, and unlike with a fit by least squares, not for a < 0.
    A flat map is 0 (s is at least 1e-4). Control images go from 0 (the farthest pixel) to 1.

    Args:
        model: a folder or hub id of transformers (any depth estimation), or a module or callable,
            pictures in [0, 1] -> ``(b, 1, h', w')`` or ``(b, h', w')``.
        metric: the model gives distances, of which the reciprocal is taken.
        distance: how aligned maps are compared, ``"l1"`` or ``"mse"``.
        size: as of ``segmentation``.

    Raises:
        FileNotFoundError, TypeError, ValueError: see :class:`Network`.
    """

    def __init__(
        self,
        model: str | Callable,
        metric: bool = False,
        distance: str = "l1",
        size: Sequence[int] | str | None = None,
    ) -> None:
        super().__init__(distance)
        self.network = Network(
            model, self.name, 1, "AutoModelForDepthEstimation", "predicted_depth", size
        )
        self.metric, self.weights = metric, self.network.weights

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        depth = self.network(images)
        return depth.clamp(min=1e-3).reciprocal() if self.metric else depth

    def control(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        depth = self(images)
        low, high = (end(depth, dim=(1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
        return ((depth - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1)

    def loss(self, prediction: Float[Tensor, "b 1 h w"], target: Float[Tensor, "b 1 h w"]) -> Map:
        return super().loss(aligned(prediction), aligned(target))

    def divergence(self, second: Float[Tensor, "b 1 h w"], first: Float[Tensor, "b 1 h w"]) -> Map:
        """The mean of |second - first|, aligned."""
        return super().divergence(aligned(second), aligned(first))

    def to(self, device: torch.device | str) -> "Depth":
        self.network.to(device)
        return self


def aligned(depth: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Minus its median, over the mean absolute deviation from it; see :class:`Depth`."""
    flat = depth.flatten(1)
    off = flat - flat.median(dim=1, keepdim=True).values
    return (off / off.abs().mean(dim=1, keepdim=True).clamp(min=1e-4)).view_as(depth)


_COCO_PAIRS = [(k, k + 1) for k in range(1, 17, 2)]  # left and right, from the eyes to the ankles


@register_extractor("pose", weights="a pose model, to be named",
                    source="Xu et al. 2022 (ViTPose), arXiv:2204.12484")  # fmt: skip
class Pose(Extractor):
    """Key-points: one heat-map each, compared by the mean squared difference.

    The picture is taken for one person, as top-down models see it. Control images show each
    key-point's heat-map in a colour of its own (hues around the circle), the strongest at each
    pixel; drawings of skeletons are not read.

    Args:
        model: a folder or hub id of transformers (ViTPose), or a module or callable, pictures in
            [0, 1] -> heat-maps ``(b, keypoints, h', w')`` in [0, 1].
        keypoints: how many.
        pairs: numbers of the left and the right one of each pair, which change places in a mirror;
            by default COCO's for 17 key-points. If they are not known, pictures are not mirrored
            to see how sure the model is.
        distance: how heat-maps are compared, ``"mse"`` or ``"l1"``.
        size: as of ``segmentation``.

    Raises:
        FileNotFoundError, TypeError, ValueError: see :class:`Network`.
        ValueError: a pair that names no key-points.
    """

    channels = 3

    def __init__(
        self,
        model: str | Callable,
        keypoints: int = 17,
        pairs: Sequence[Sequence[int]] | None = None,
        distance: str = "mse",
        size: Sequence[int] | str | None = None,
    ) -> None:
        super().__init__(distance)
        if keypoints < 1:
            raise ValueError(f"keypoints of extractor 'pose' must be 1 or more, {keypoints} came")
        self.network = Network(
            model, self.name, keypoints, "AutoModelForPoseEstimation", "heatmaps", size
        )
        self.weights = self.network.weights
        if pairs is None and keypoints == 17:
            pairs = _COCO_PAIRS
        if pairs is None:
            self.augmentations = tuple(name for name in self.augmentations if name != "flip")
        self.mirrored = list(range(keypoints))
        for left, right in pairs or ():
            if not (0 <= left < keypoints and 0 <= right < keypoints):
                raise ValueError(
                    f"pairs of extractor 'pose' name key-points 0 to {keypoints - 1}, but "
                    f"({left}, {right}) came"
                )
            self.mirrored[left], self.mirrored[right] = right, left
        hues = [colorsys.hsv_to_rgb(k / keypoints, 1, 1) for k in range(keypoints)]
        self.palette = torch.tensor(hues)

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k h w"]:
        return self.network(images)

    def unflip(self, prediction: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
        return prediction[:, self.mirrored].flip(-1)

    def control(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        heat, at = self(images).clamp(0, 1).max(dim=1)
        return heat[:, None] * self.palette.to(heat)[at].permute(0, 3, 1, 2)

    @torch.no_grad()
    def target(self, control: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k h w"]:
        """Each pixel as an amount of the one colour that explains it best."""
        colours = self.palette.to(control)  # (k, 3)
        along = torch.einsum("bchw,kc->bkhw", control, colours)
        norms = colours.square().sum(dim=1).view(1, -1, 1, 1)
        amount = (along / norms).clamp(0, 1)
        explained = 2 * amount * along - amount.square() * norms  # of the pixel's square
        best = explained.argmax(dim=1, keepdim=True)
        return torch.zeros_like(amount).scatter(1, best, amount.gather(1, best))

    def to(self, device: torch.device | str) -> "Pose":
        self.network.to(device)
        return self
