"""Probes: plain statistics of images that show what a reward has been hacked with.

Blur, grids, washed-out or garish colours, emptied backgrounds: a finetuned model's reward rises
and these move. They are rewards like any other, without weights. All but ``saturation`` look at
the *luma* of ITU-R BT.601, ``0.299 R + 0.587 G + 0.114 B``.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards.base import register_reward
from diffreward.samples import Samples

_PROBE = dict(modality="image", licence="Apache-2.0")


def luma(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
    """Luma of ITU-R BT.601, in the units of the pixels."""
    red, green, blue = images.unbind(dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


@register_reward(
    "sharpness",
    differentiable=True,
    range=(0.0, 1_040_400.0),
    source="Pech-Pacheco et al. 2000, Diatom autofocusing in brightfield microscopy",
    **_PROBE,
)
def sharpness() -> Callable[[Samples], Tensor]:
    """Variance of the Laplacian of the luma, on the scale of pixels in 0..255."""
    return lambda samples: laplacian_variance(samples.data)


def laplacian_variance(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Variance over the pixels of the luma's Laplacian: low where an image is out of focus.

    Pixels are in 0..255, the Laplacian is the sum of the four neighbours less four times the
    pixel, and the image is mirrored at its edges without repeating them, as OpenCV does. The
    Laplacian lies in -4 * 255..4 * 255, so its variance is at most (4 * 255)^2. It depends on
    the resolution: compare images of one size.

    Raises:
        ValueError: a side is one pixel long.
    """
    if min(images.shape[-2:]) < 2:
        raise ValueError(
            f"sharpness needs two pixels a side, but images of {tuple(images.shape[-2:])} came"
        )
    grey = F.pad(255 * luma(images)[:, None], (1, 1, 1, 1), mode="reflect")
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return F.conv2d(grey, kernel[None, None]).flatten(1).var(dim=1, correction=0)


@register_reward(
    "contrast",
    differentiable=True,
    range=(0.0, 0.5),
    source="Peli 1990, Contrast in complex images (RMS contrast)",
    **_PROBE,
)
def contrast() -> Callable[[Samples], Tensor]:
    """RMS contrast: standard deviation of the luma in [0, 1]."""
    return lambda samples: rms_contrast(samples.data)


def rms_contrast(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Standard deviation (of the population) of the luma; 1/2 for half black, half white.

    The gradient of a flat image is zero.
    """
    grey = luma(images).flatten(1)
    # The norm, unlike std, has a finite gradient at zero.
    distance = torch.linalg.vector_norm(grey - grey.mean(dim=1, keepdim=True), dim=1)
    return distance / math.sqrt(grey.shape[1])


@register_reward(
    "saturation",
    differentiable=True,
    range=(0.0, 1.0),
    source="Smith 1978, Color gamut transform pairs (HSV)",
    **_PROBE,
)
def saturation() -> Callable[[Samples], Tensor]:
    """Mean HSV saturation of the pixels."""
    return lambda samples: hsv_saturation(samples.data)


def hsv_saturation(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Mean over the pixels of (max - min) / max over R, G and B; black pixels count 0.

    A maximum below 1/255, which no 8-bit pixel has but black, counts as 1/255: this bounds the
    gradient.
    """
    high, low = images.amax(dim=1), images.amin(dim=1)
    return ((high - low) / high.clamp_min(1 / 255)).flatten(1).mean(dim=1)


@register_reward(
    "entropy",
    differentiable=False,
    range=(0.0, 8.0),
    source="Shannon 1948, of the histogram of the luma",
    **_PROBE,
)
def entropy() -> Callable[[Samples], Tensor]:
    """Entropy of the 256-bin histogram of the luma, in bits."""
    return lambda samples: luma_entropy(samples.data)


def luma_entropy(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """-sum p log2 p over the 256 levels of the luma of the 8-bit image; 0 for a flat one."""
    pixels = (images.detach() * 255).round().clamp(0, 255)
    levels = luma(pixels).round().long().flatten(1)
    counts = torch.zeros(len(levels), 256, device=levels.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=counts.dtype))
    return torch.special.entr(counts / levels.shape[1]).sum(dim=1) / math.log(2)
