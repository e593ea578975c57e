"""Rewards for images, float32 RGB in [0, 1], ``(b, 3, h, w)``.

``clip_score`` and ``clip_judge`` compare an image with its prompt; the others need no weights.
"""

import difflib
import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image, ImageColor
from torch import Tensor

from diffreward._assets import asset_path
from diffreward.rewards.base import RewardInfo, Scores, register_reward
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
_TEXT_CACHE_SIZE = 4096  # prompts; at 1024 features this is 16 MB


@register_reward("clip_score", weights="embedded:clip_guide", **_CLIP)
def clip_score(
    model: str = "embedded:clip_guide", pretrained: str | None = None, chunk_size: int = 64
) -> "ClipScore":
    """Cosine of the CLIP embeddings of the image and its prompt.

    Args:
        model: ``"embedded:clip_guide"``, ``"embedded:clip_judge"``, ``"local-dir:PATH"`` (a
            folder in open_clip's layout), ``"hf-hub:ORG/REPO"``, or an open_clip architecture
            such as ``"ViT-L-14"``.
        pretrained: for an architecture: its open_clip tag (``"openai"``) or a checkpoint file.
        chunk_size: images (or new prompts) given to the network at once.
    """
    return ClipScore(model, pretrained, chunk_size)


@register_reward("clip_judge", weights="embedded:clip_judge", **_CLIP)
def clip_judge(chunk_size: int = 64) -> "ClipScore":
    """clip_score by the second embedded CLIP, held out to judge what the first one guided."""
    return ClipScore("embedded:clip_judge", None, chunk_size, name="clip_judge")


class ClipScore:
    """Cosine similarity of image and prompt in an open_clip model, in [-1, 1].

    A plain cosine: not multiplied by the model's logit scale, by 100 or by 2.5, and not clipped
    at zero. Differentiable in the images. The network is frozen, in eval mode and in float32; it
    follows the samples' device. Prompts are encoded once each and remembered.

    Args:
        model, pretrained, chunk_size: see :func:`clip_score`.
        name: what the reward is called in reports.

    Raises:
        FileNotFoundError: the embedded asset, the folder or the checkpoint is missing.
        ValueError: an unknown architecture, no or unknown ``pretrained`` for an architecture
            (its weights would be random), or ``pretrained`` beside a folder or hub id.
        RuntimeError: open_clip could not load or download the weights.
    """

    def __init__(
        self,
        model: str = "embedded:clip_guide",
        pretrained: str | None = None,
        chunk_size: int = 64,
        name: str = "clip_score",
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but {chunk_size} came")
        weights = model if pretrained is None else f"{model} ({pretrained})"
        self.info = RewardInfo(
            name=name, weights=weights, description=f"CLIP cosine, {weights}", **_CLIP
        )
        self.chunk_size = chunk_size
        self.network, self._tokenizer = _load_open_clip(model, pretrained)
        self.network.requires_grad_(False).eval()
        self._text: dict[str, Tensor] = {}

    def __call__(self, samples: Samples) -> Scores:
        self.to(samples.data.device)
        text = self.text_features(samples.prompts)
        return Scores((self.image_features(samples.data) * text).sum(dim=-1))

    def to(self, device: torch.device | str) -> "ClipScore":
        """Move the network; a call does this by itself to where its samples are."""
        device = torch.device(device)
        if next(self.network.parameters()).device != device:
            # Not in the caller's inference mode: the weights must stay usable for gradients.
            with torch.inference_mode(False):
                self.network.to(device)
                self._text.clear()
        return self

    def image_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit-norm image embeddings, differentiable."""
        cfg = self.network.visual.preprocess_cfg
        chunks = [
            self.network.encode_image(preprocess(chunk.float(), **_sizes(cfg)), normalize=True)
            for chunk in images.split(self.chunk_size)
        ]
        return torch.cat(chunks).float()

    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit-norm prompt embeddings, without gradient."""
        unique = dict.fromkeys(prompts)
        features = {prompt: self._text[prompt] for prompt in unique if prompt in self._text}
        new = [prompt for prompt in unique if prompt not in features]
        with torch.no_grad():
            for start in range(0, len(new), self.chunk_size):
                chunk = new[start : start + self.chunk_size]
                encoded = self.network.encode_text(self._tokenize(chunk), normalize=True)
                features.update(zip(chunk, encoded.float(), strict=True))
        self._text.update(features)
        while len(self._text) > _TEXT_CACHE_SIZE:
            del self._text[next(iter(self._text))]  # the oldest
        return torch.stack([features[prompt] for prompt in prompts])

    def _tokenize(self, prompts: list[str]) -> Int[Tensor, "b l"]:
        tokens = self._tokenizer(prompts)
        length = tokens.shape[1]
        # open_clip truncates silently. With more room, a prompt that fits has padding (or its
        # end) at the last place of the short row, as the short row has; one that does not fit
        # has a word there. ("clips" rows end in a class token: not comparable.)
        if not getattr(self._tokenizer, "tokenizer_mode", ""):
            roomy = self._tokenizer(prompts, context_length=2 * length)
            for i in (tokens[:, -1] != roomy[:, length - 1]).nonzero()[:, 0].tolist():
                warnings.warn(
                    f"reward {self.info.name!r} reads only the first {length} tokens of "
                    f"{prompts[i]!r}",
                    stacklevel=2,
                )
        return tokens.to(next(self.network.parameters()).device)


def _load_open_clip(model: str, pretrained: str | None) -> tuple[torch.nn.Module, Callable]:
    """A network with weights (never random ones) and its tokenizer; see :class:`ClipScore`."""
    import open_clip

    if model.startswith("embedded:"):
        model = f"local-dir:{asset_path(model.removeprefix('embedded:'))}"
    quick_gelu = False
    if model.startswith(("local-dir:", "hf-hub:")):
        if pretrained is not None:
            raise ValueError(f"{model!r} has its own weights; leave out pretrained={pretrained!r}")
        if model.startswith("local-dir:"):
            config = Path(model.removeprefix("local-dir:")) / "open_clip_config.json"
            if not config.is_file():
                raise FileNotFoundError(f"{config} is missing: not a folder saved by open_clip")
    else:
        model = model.replace("/", "-")
        if model not in open_clip.list_models():
            near = difflib.get_close_matches(model, open_clip.list_models(), n=3)
            raise ValueError(
                f"open_clip has no architecture {model!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "")
                + " (For a folder write 'local-dir:PATH', for the hub 'hf-hub:ORG/REPO'.)"
            )
        tags = open_clip.list_pretrained_tags_by_model(model)
        if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
            came = "none came" if pretrained is None else f"{pretrained!r} is neither"
            raise ValueError(
                f"{model!r} needs pretrained=, a checkpoint file or one of "
                f"{', '.join(tags) or '(no tags)'}; {came}"
            )
        # open_clip only warns when a tag was trained with another GELU than the architecture's.
        tag = open_clip.get_pretrained_cfg(model, pretrained) if pretrained in tags else {}
        quick_gelu = bool(tag.get("quick_gelu", False))
    network = open_clip.create_model(
        model, pretrained=pretrained, require_pretrained=True, force_quick_gelu=quick_gelu
    )
    return network, open_clip.get_tokenizer(model)


def _sizes(cfg: dict) -> dict:
    """open_clip's ``preprocess_cfg`` as arguments of :func:`preprocess`."""
    size = cfg["size"]
    return dict(
        size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation="bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
        resize_mode=cfg["resize_mode"],
        fill=cfg["fill_color"] / 255,
    )


def preprocess(
    images: Float[Tensor, "b 3 h w"],
    *,
    size: tuple[int, int],
    mean: Sequence[float | int],
    std: Sequence[float | int],
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
    fill: float = 0.0,
) -> Float[Tensor, "b 3 H W"]:
    """Resize, crop or pad to ``size`` (H, W), and normalise: open_clip's transform, on tensors.

    The same filter as PIL's (antialiased, in float where PIL rounds to 8 bits), differentiable.

    Args:
        resize_mode: ``"shortest"``: the image covers the target and is cropped at its centre;
            ``"longest"``: it fits inside and is padded; ``"squash"``: its aspect is not kept.
        fill: value of the padding, in [0, 1].
    """
    h, w = images.shape[-2:]
    if resize_mode == "squash":
        resized = size
    elif resize_mode == "shortest" and size[0] == size[1]:
        # open_clip leaves this case to torchvision's Resize, which truncates.
        resized = (int(size[0] * h / min(h, w)), int(size[0] * w / min(h, w)))
    else:
        choose = max if resize_mode == "longest" else min
        ratio = choose(h / size[0], w / size[1])
        resized = (round(h / ratio), round(w / ratio))
    if resized != (h, w):
        images = F.interpolate(
            images, size=resized, mode=interpolation, antialias=True, align_corners=False
        ).clamp(0, 1)  # bicubic overshoots; PIL's pixels cannot
    if resized != size:
        images = _centre(images, size, fill)
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def _centre(images: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    """Pad, then crop, around the centre, with torchvision's rounding."""
    extra = [max(target - now, 0) for target, now in zip(size, images.shape[-2:], strict=True)]
    pad = [extra[1] // 2, (extra[1] + 1) // 2, extra[0] // 2, (extra[0] + 1) // 2]
    images = F.pad(images, pad, value=fill)
    top, left = (round((images.shape[dim] - size[dim]) / 2) for dim in (-2, -1))
    return images[..., top : top + size[0], left : left + size[1]]


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
    return _sqrt(variance) + 0.3 * _sqrt(mean_square)


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero: a grey image must not give NaN."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, 1.0, x).sqrt())


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
