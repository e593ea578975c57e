"""Rewards for images, float32 RGB in [0, 1], ``(b, 3, h, w)``.

``clip_score`` and ``clip_judge`` compare an image with its prompt, ``aesthetic`` rates the image
alone; the others need no weights.
"""

import difflib
import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageColor
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from diffreward.rewards.base import RewardInfo, Scores, register_reward
from diffreward.rewards.combine import safe_sqrt
from diffreward.rewards.towers import CosineReward, Tower, TowerReward, load_tower
from diffreward.rewards.weights import weights_file
from diffreward.samples import Samples

# --------------------------------------------------------------------------------------------
# CLIP
# --------------------------------------------------------------------------------------------

_CLIP = dict(
    modality="image",
    differentiable=True,
    needs_prompt=True,
    range=(-1.0, 1.0),
    licence="Apache-2.0 (embedded); otherwise that of the weights",
    source="Radford et al. 2021, arXiv:2103.00020",
)


@register_reward("clip_score", weights="embedded:clip_guide", **_CLIP)
def clip_score(
    model: str = "embedded:clip_guide",
    pretrained: str | None = None,
    chunk_size: int = 64,
    exact: bool = False,
) -> "ClipScore":
    """Cosine of the CLIP embeddings of the image and its prompt.

    Args:
        model: ``"embedded:clip_guide"``, ``"embedded:clip_judge"``, ``"local-dir:PATH"`` (a
            folder in open_clip's layout), ``"hf-hub:ORG/REPO"``, an open_clip architecture such
            as ``"ViT-L-14"``, or ``"transformers:ORG/NAME"`` or ``"transformers:PATH"`` (CLIP or
            SigLIP).
        pretrained: for an architecture: its open_clip tag (``"openai"``) or a checkpoint file.
        chunk_size: images (or new prompts) given to the network at once.
        exact: resize in PIL with 8 bits, as the originals do; without gradient.
    """
    return ClipScore(model, pretrained, chunk_size, exact=exact)


@register_reward("clip_judge", weights="embedded:clip_judge", **_CLIP)
def clip_judge(chunk_size: int = 64, exact: bool = False) -> "ClipScore":
    """clip_score by the second embedded CLIP, held out to judge what the first one guided."""
    return ClipScore("embedded:clip_judge", None, chunk_size, name="clip_judge", exact=exact)


class ClipScore(CosineReward):
    """Cosine similarity of image and prompt in a CLIP, in [-1, 1].

    A plain cosine: not multiplied by the model's logit scale, by 100 or by 2.5, and not clipped
    at zero. Differentiable in the images. The network is frozen, in eval mode and in float32; it
    follows the samples' device. Prompts are encoded once each and remembered.

    Args:
        model, pretrained, chunk_size, exact: see :func:`clip_score`.
        name: what the reward is called in reports.

    Raises:
        FileNotFoundError, ValueError, RuntimeError, OSError: see
            :func:`~diffreward.rewards.towers.load_tower`.
    """

    def __init__(
        self,
        model: str = "embedded:clip_guide",
        pretrained: str | None = None,
        chunk_size: int = 64,
        name: str = "clip_score",
        exact: bool = False,
    ) -> None:
        weights = _named(model, pretrained)
        info = RewardInfo(
            name=name, weights=weights, description=f"CLIP cosine, {weights}", **_CLIP
        )
        tower = load_tower(model, pretrained)
        super().__init__(info, tower, exact=exact, chunk_size=chunk_size)

    @property
    def network(self) -> nn.Module:
        """The CLIP itself."""
        return self.tower.network


def _named(model: str, pretrained: str | None) -> str:
    return model if pretrained is None else f"{model} ({pretrained})"


# --------------------------------------------------------------------------------------------
# Aesthetics: a linear head on normalised image embeddings
# --------------------------------------------------------------------------------------------

_LAION_HEAD = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
_AESTHETIC = dict(
    modality="image",
    differentiable=True,
    licence="Apache-2.0 (head, by its ports); MIT (OpenAI CLIP)",
    source="Schuhmann 2022, improved-aesthetic-predictor; LAION-5B, arXiv:2210.08402",
)


@register_reward("aesthetic", weights=f"ViT-L-14 (openai) + {_LAION_HEAD}", **_AESTHETIC)
def aesthetic(
    head: str = _LAION_HEAD,
    model: str = "ViT-L-14",
    pretrained: str | None = None,
    chunk_size: int = 64,
    exact: bool = False,
) -> "AestheticScore":
    """LAION's improved aesthetic predictor: a rating from about 1 to 10.

    Args:
        head: its weights, ``sac+logos+ava1-l14-linearMSE.pth``: a file, or ``ORG/REPO/FILE`` on
            the hub (by default TRL's copy).
        model, pretrained: the CLIP it was trained on, as in :func:`clip_score`, with which it
            shares the tower; by default OpenAI's ViT-L-14.
        chunk_size, exact: as in :func:`clip_score`.
    """
    if pretrained is None and model.replace("/", "-") == "ViT-L-14":
        pretrained = "openai"
    weights = f"{_named(model, pretrained)} + {head}"
    info = RewardInfo(
        name="aesthetic", weights=weights, description=f"LAION aesthetics, {weights}", **_AESTHETIC
    )
    mlp = load_aesthetic_head(head)  # first: a wrong path shows before a gigabyte is loaded
    return AestheticScore(
        info, load_tower(model, pretrained), head=mlp, exact=exact, chunk_size=chunk_size
    )


class AestheticScore(TowerReward):
    """A head on unit-norm image embeddings; needs no prompts.

    Args:
        head: maps ``(b, d)`` to ``(b, 1)``, see :func:`load_aesthetic_head`.
    """

    def __init__(self, info: RewardInfo, tower: Tower, *, head: nn.Sequential, **options: Any):
        super().__init__(info, tower, **options)
        self.head = head

    def score_prepared(
        self, prepared: Float[Tensor, "b 3 H W"], prompts: Sequence[str] | None = None
    ) -> Scores:
        features, reads = self.encode(prepared), self.head[0].in_features
        if features.shape[1] != reads:
            raise ValueError(
                f"reward {self.info.name!r}: its head reads embeddings of {reads} numbers, but "
                f"{self.tower.name} gives {features.shape[1]}: it was trained on another tower"
            )
        with torch.inference_mode(False):
            self.head.to(features.device)
        return Scores(self.head(features).squeeze(-1))

    def to(self, device: torch.device | str) -> "AestheticScore":
        self.head.to(device)
        return super().to(device)


def load_aesthetic_head(path: str | Path) -> nn.Sequential:
    """The head of LAION's improved aesthetic predictor, frozen: ``(b, 768)`` to ``(b, 1)``.

    Five linear layers, 768-1024-128-64-16-1 in the published one, with dropout between them in
    training and no activation: as a function of the embedding it is affine.

    Args:
        path: of the published ``.pth`` or the same tensors in safetensors, named
            ``layers.{0,2,4,6,7}.{weight,bias}``; or ``ORG/REPO/FILE`` on the hub.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other tensors than these are in it (such as those of the variants with ReLU).
    """
    return load_linear_head(path, [f"layers.{i}" for i in (0, 2, 4, 6, 7)])


def load_linear_head(path: str | Path, layers: Sequence[str]) -> nn.Sequential:
    """Linear layers without activations, frozen, in float32, from a file of their weights.

    Args:
        path: ``.safetensors``, or what ``torch.load(weights_only=True)`` reads.
        layers: their names in the file, in order; nothing else may be in it.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_aesthetic_head`.
    """
    file = weights_file(str(path))
    if file.endswith(".safetensors"):
        weights = load_safetensors(file)
    else:
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as err:
            raise ValueError(f"{file} is no file of weights: {err}") from err
    names = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    if not isinstance(weights, Mapping) or set(weights) != set(names):
        came = ", ".join(map(str, weights)) if isinstance(weights, Mapping) else type(weights)
        raise ValueError(
            f"{file} has not the layout of this head: expected {', '.join(names)}; it holds {came}"
        )
    shapes = [tuple(weights[f"{layer}.weight"].shape) for layer in layers]
    widths = [shapes[0][-1], *(shape[0] for shape in shapes)]
    if widths[-1] != 1 or shapes != list(zip(widths[1:], widths[:-1], strict=True)):
        raise ValueError(
            f"{file} has not the layout of this head: its layers do not lead from one to the next "
            f"and to one number, their weights are {', '.join(map(str, shapes))}"
        )
    # Not in the caller's inference mode: the weights must stay usable for gradients.
    with torch.inference_mode(False):
        head = nn.Sequential(*map(nn.Linear, widths[:-1], widths[1:]))
        head.load_state_dict(
            {
                f"{i}.{part}": weights[f"{layer}.{part}"]
                for i, layer in enumerate(layers)
                for part in ("weight", "bias")
            }
        )
    return head.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------
# JPEG size
# --------------------------------------------------------------------------------------------

_JPEG = dict(
    modality="image",
    differentiable=False,
    licence="Apache-2.0",
    source="Black et al. 2023 (DDPO), arXiv:2305.13301",
)


@register_reward("jpeg_compressibility", range=(-math.inf, 0.0), **_JPEG)
def jpeg_compressibility(quality: int = 95) -> Callable[[Samples], Tensor]:
    """Minus the size of the JPEG file, in kB (1000 bytes).

    Args:
        quality: PIL's JPEG quality, 1 to 100.
    """
    _check_quality(quality)
    return lambda samples: -jpeg_kilobytes(samples.data, quality)


@register_reward("jpeg_incompressibility", range=(0.0, math.inf), **_JPEG)
def jpeg_incompressibility(quality: int = 95) -> Callable[[Samples], Tensor]:
    """The size of the JPEG file, in kB (1000 bytes).

    Args:
        quality: PIL's JPEG quality, 1 to 100.
    """
    _check_quality(quality)
    return lambda samples: jpeg_kilobytes(samples.data, quality)


def jpeg_kilobytes(images: Float[Tensor, "b 3 h w"], quality: int = 95) -> Float[Tensor, " b"]:
    """Size in kB (1000 bytes) of each image as a JPEG file; NaN for an image with a NaN."""
    pixels = (images.detach() * 255).round().clamp(0, 255)
    broken = pixels.isnan().flatten(1).any(dim=1)
    kilobytes = []
    for image in pixels.nan_to_num().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=quality)
        kilobytes.append(file.tell() / 1000)
    sizes = torch.tensor(kilobytes, dtype=torch.float32, device=images.device)
    return sizes.masked_fill(broken, math.nan)


def _check_quality(quality: int) -> None:
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality is from 1 to 100, but {quality} came")


# --------------------------------------------------------------------------------------------
# Colour
# --------------------------------------------------------------------------------------------


@register_reward(
    "colorfulness",
    modality="image",
    differentiable=True,
    range=(0.0, 298.0),
    licence="Apache-2.0",
    source="Hasler & Süsstrunk 2003, Measuring colourfulness in natural images, M^(3)",
)
def colorfulness() -> Callable[[Samples], Tensor]:
    """Hasler and Süsstrunk's colourfulness, on the scale of pixels in 0..255."""
    return lambda samples: hasler_colorfulness(samples.data)


def hasler_colorfulness(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """M = sigma_rgyb + 0.3 mu_rgyb (Hasler & Süsstrunk 2003, section 7, metric M^(3)).

    With pixels in 0..255, ``rg = R - G`` and ``yb = (R + G) / 2 - B``; sigma_rgyb and mu_rgyb are
    the Euclidean norms of their standard deviations (of the population) and of their means. In
    the paper, 0 is called not colourful, 33 moderately, 59 quite, 109 extremely colourful. Since
    sigma^2 + mu^2 is the mean of rg^2 + yb^2, at most 1.25 * 255^2, M is below 298.
    """
    red, green, blue = (images * 255).flatten(2).unbind(dim=1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])  # (2, b, pixels)
    variance = opponents.var(dim=-1, correction=0).sum(dim=0)
    mean_square = opponents.mean(dim=-1).square().sum(dim=0)
    return safe_sqrt(variance) + 0.3 * safe_sqrt(mean_square)


@register_reward(
    "target_color",
    modality="image",
    differentiable=True,
    range=(-1.0, 0.0),
    licence="Apache-2.0",
    source="this package",
)
def target_color(
    color: str | Sequence[float | int] = "red",
    background: str | Sequence[float | int] | None = None,
) -> Callable[[Samples], Tensor]:
    """Minus the mean squared distance of the image's mean colour to a target, RGB in [0, 1].

    Args:
        color: the target: a CSS name, ``"#rrggbb"``, or three numbers in [0, 1].
        background: if given, the mean is over what differs from this colour: each pixel weighs
            as much as its largest difference from it in one channel, a soft mask through which
            gradients flow. An image of nothing but background has the background's colour.
    """
    target = _rgb(color)
    behind = None if background is None else _rgb(background)

    def reward(samples: Samples) -> Tensor:
        mean = _mean_color(samples.data, behind)
        return -(mean - mean.new_tensor(target)).square().mean(dim=1)

    return reward


def _mean_color(
    images: Float[Tensor, "b 3 h w"], background: tuple[float, float, float] | None
) -> Float[Tensor, "b 3"]:
    pixels = images.flatten(2)  # (b, 3, pixels)
    if background is None:
        return pixels.mean(dim=2)
    behind = pixels.new_tensor(background)
    weight = (pixels - behind[:, None]).abs().amax(dim=1, keepdim=True)
    # One pixel in a million of background keeps the mean defined when there is nothing else.
    tiny = 1e-6 * pixels.shape[2]
    total = (weight * pixels).sum(dim=2) + tiny * behind
    return total / (weight.sum(dim=2) + tiny)


def _rgb(color: str | Sequence[float | int]) -> tuple[float, float, float]:
    """A colour as three numbers in [0, 1]."""
    if isinstance(color, str):
        try:
            red, green, blue = ImageColor.getrgb(color)[:3]
        except ValueError:
            near = difflib.get_close_matches(color, ImageColor.colormap, n=3)
            raise ValueError(
                f"there is no colour {color!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "")
                + " (A colour is a CSS name, '#rrggbb', or three numbers in [0, 1].)"
            ) from None
        return red / 255, green / 255, blue / 255
    numbers = tuple(float(number) for number in color)
    if len(numbers) != 3 or not all(0 <= number <= 1 for number in numbers):
        raise ValueError(f"a colour is three numbers in [0, 1], but {tuple(color)} came")
    return numbers
