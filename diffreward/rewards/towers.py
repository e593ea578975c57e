"""Frozen image and text encoders ("towers"), and what they read: pixels as their authors made them.

Rewards that name the same weights share one tower, and inside :func:`share_towers` it runs once a
batch, however many of them ask::

    with share_towers():
        total = evaluate(clip_score, samples).value + evaluate(aesthetic, samples).value

A tower is frozen, in eval mode and float32, and its features are not normalised. Prompts are
encoded once each and remembered. open_clip and transformers are imported when first needed.
"""

import difflib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from diffreward._assets import asset_path
from diffreward.rewards.base import RewardInfo, Scores
from diffreward.samples import Samples

# --------------------------------------------------------------------------------------------
# Sharing
# --------------------------------------------------------------------------------------------

_memo: ContextVar[WeakTensorKeyDictionary | None] = ContextVar("shared_features", default=None)


@contextmanager
def share_towers() -> Iterator[None]:
    """Inside, the same work on the same tensor is done once: preprocessing and encoding.

    The same tensor is the same object, not modified since, asked for in the same gradient mode.
    Results are dropped with the tensor they were computed from, and all of them at the end; a
    nested block joins the outer one. Outside, nothing but prompts is remembered.

    Features computed with gradient share one graph, so add up what you want before the one
    ``backward()``.
    """
    if _memo.get() is not None:
        yield
        return
    token = _memo.set(WeakTensorKeyDictionary())
    try:
        yield
    finally:
        _memo.reset(token)


def _shared(work: Hashable, tensor: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, or what it gave when this work was last done on this tensor."""
    memo = _memo.get()
    if memo is None:
        return compute()
    mode = (
        tensor.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(tensor.device.type),
    )
    known = memo.setdefault(tensor, {})
    if (work, mode) in known:
        before, result = known[work, mode]
        # Tensors made in inference mode count no versions: their values are compared instead.
        same = torch.equal(before, tensor) if isinstance(before, Tensor) else before == _at(tensor)
        if same:
            return result
    result = compute()
    known[work, mode] = (tensor.clone() if tensor.is_inference() else _at(tensor), result)
    return result


def _at(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, tensor.data_ptr()


# --------------------------------------------------------------------------------------------
# Preprocessing
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop or pad to ``size`` (H, W), and normalise: what open_clip and transformers do.

    By default on tensors: the same filter as PIL's (antialiased, in float where PIL rounds to 8
    bits), differentiable. Two of these that are equal give equal pixels.

    Attributes:
        size: (H, W) of what comes out.
        mean, std: of the three channels, in [0, 1].
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize_mode: ``"shortest"``: the image covers the target and is cropped at its centre;
            ``"longest"``: it fits inside and is padded (letterbox); ``"squash"``: its aspect is
            not kept.
        fill: value of the padding, in [0, 1].
        exact: round to 8 bits and resize in PIL, as the originals do: their numbers, one image
            at a time, and no gradient.
        clip: cut off what bicubic overshoots of [0, 1], as PIL does. Without it the resize is in
            float, and ``exact`` only rounds the image to 8 bits first.
        floor: the crop's offset is rounded down, as in transformers; otherwise to the nearest
            integer (halves to even), as in torchvision.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill: float = 0.0
    exact: bool = False
    clip: bool = True
    floor: bool = False

    def __post_init__(self) -> None:
        if self.interpolation not in _FILTERS:
            raise ValueError(
                f"interpolation is one of {', '.join(_FILTERS)}, but {self.interpolation!r} came"
            )
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ValueError(
                f"resize_mode is shortest, longest or squash, but {self.resize_mode!r} came"
            )

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 H W"]:
        """``(b, 3, H, W)`` float32 from images in [0, 1]; NaN for an exact image with a NaN."""
        return _shared(self, images, lambda: self._compute(images))

    def _compute(self, images: Tensor) -> Tensor:
        images = images.float()
        broken = None
        if self.exact:
            images = (images.detach() * 255).round().clamp(0, 255)
            broken = images.isnan().flatten(1).any(dim=1)
            images = images.nan_to_num() / 255
        resized = self._resized(*images.shape[-2:])
        if resized != tuple(images.shape[-2:]):
            images = self._resize(images, resized)
        if resized != self.size:
            images = self._centre(images)
        shape = (1, 3, 1, 1)
        images = images - images.new_tensor(self.mean).view(shape)
        images = images / images.new_tensor(self.std).view(shape)
        if broken is not None and broken.any():
            images[broken] = torch.nan  # 8 bits know no NaN; it must not become a black pixel
        return images

    def _resized(self, h: int, w: int) -> tuple[int, int]:
        """The image's size before it is cropped or padded."""
        height, width = self.size
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and height == width:
            # torchvision's Resize, which truncates
            return int(height * h / min(h, w)), int(height * w / min(h, w))
        choose = max if self.resize_mode == "longest" else min
        ratio = choose(h / height, w / width)
        return max(round(h / ratio), 1), max(round(w / ratio), 1)

    def _resize(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if self.exact and self.clip:
            height, width = size
            pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            resized = [
                np.asarray(Image.fromarray(p).resize((width, height), _FILTERS[self.interpolation]))
                for p in pixels
            ]
            return torch.from_numpy(np.stack(resized)).to(images.device).permute(0, 3, 1, 2) / 255
        images = F.interpolate(
            images, size=size, mode=self.interpolation, antialias=True, align_corners=False
        )
        return images.clamp(0, 1) if self.clip else images

    def _centre(self, images: Tensor) -> Tensor:
        """Pad, then crop, around the centre."""
        height, width = self.size
        down, across = max(height - images.shape[-2], 0), max(width - images.shape[-1], 0)
        pad = [across // 2, (across + 1) // 2, down // 2, (down + 1) // 2]
        images = F.pad(images, pad, value=self.fill)
        over = images.shape[-2] - height, images.shape[-1] - width
        top, left = (extra // 2 if self.floor else round(extra / 2) for extra in over)
        return images[..., top : top + height, left : left + width]


_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


# --------------------------------------------------------------------------------------------
# Towers
# --------------------------------------------------------------------------------------------

_TEXT_CACHE_SIZE = 4096  # prompts; at 1024 features this is 16 MB
_TOWERS: WeakValueDictionary[Hashable, "Tower"] = WeakValueDictionary()


class Tower(ABC):
    """A frozen encoder of images, and of prompts where it has a text side.

    Get one from :func:`load_tower`. A subclass gives ``_encode_images`` and ``_encode_tokens``
    for one chunk, and ``_tokenize``, which also says how many tokens each prompt has.

    Attributes:
        key: which weights; equal keys are one object.
        name: the weights, as their user called them.
        preprocess: what its authors feed it.
        network: the module, frozen, in eval mode, float32.
        logit_scale: what the model multiplies its cosines with (1 if it has no such parameter).
    """

    def __init__(self, key: Hashable, name: str, network: nn.Module, preprocess: Preprocess):
        self.key = key
        self.name = name
        self.network = network.requires_grad_(False).eval()
        self.preprocess = preprocess
        scale = getattr(network, "logit_scale", None)
        self.logit_scale = 1.0 if scale is None else scale.exp().item()
        self._text: dict[str, Tensor] = {}

    def to(self, device: torch.device | str) -> "Tower":
        """Move the network; rewards do this by themselves to where their samples are."""
        device = torch.device(device)
        if next(self.network.parameters()).device != device:
            # Not in the caller's inference mode: the weights must stay usable for gradients.
            with torch.inference_mode(False):
                self.network.to(device)
                self._text.clear()
        return self

    def image_features(
        self,
        images: Float[Tensor, "b 3 h w"],
        preprocess: Preprocess | None = None,
        chunk_size: int = 64,
    ) -> Float[Tensor, "b d"]:
        """``encode(preprocess(images))``, by default with the tower's own ``preprocess``."""
        return self.encode((preprocess or self.preprocess)(images), chunk_size)

    def encode(
        self, prepared: Float[Tensor, "b 3 H W"], chunk_size: int = 64
    ) -> Float[Tensor, "b d"]:
        """Features of preprocessed images, float32, ``chunk_size`` at a time, differentiable."""
        self.to(prepared.device)

        def compute() -> Tensor:
            chunks = prepared.split(chunk_size)
            return torch.cat([self._encode_images(chunk).float() for chunk in chunks])

        return _shared(self, prepared, compute)

    def text_features(self, prompts: Sequence[str], chunk_size: int = 64) -> Float[Tensor, "b d"]:
        """Features of prompts, float32, without gradient; each prompt is encoded once.

        Warns of a prompt that is too long for the tower and is not read whole.
        """
        unique = dict.fromkeys(prompts)
        features = {prompt: self._text[prompt] for prompt in unique if prompt in self._text}
        new = [prompt for prompt in unique if prompt not in features]
        device = next(self.network.parameters()).device
        # What is remembered must not depend on who asked first, in which precision.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for start in range(0, len(new), chunk_size):
                chunk = new[start : start + chunk_size]
                tokens, whole = self._tokenize(chunk)
                for prompt, read in zip(chunk, whole, strict=True):
                    if not read:
                        warnings.warn(
                            f"{self.name} reads only the first {tokens.shape[1]} tokens of "
                            f"{prompt!r}",
                            stacklevel=2,
                        )
                encoded = self._encode_tokens(tokens.to(device)).float()
                features.update(zip(chunk, encoded, strict=True))
        self._text.update(features)
        while len(self._text) > _TEXT_CACHE_SIZE:
            del self._text[next(iter(self._text))]  # the oldest
        return torch.stack([features[prompt] for prompt in prompts])

    @abstractmethod
    def _encode_images(self, prepared: Tensor) -> Tensor: ...

    def _tokenize(self, prompts: list[str]) -> tuple[Int[Tensor, "b l"], list[bool]]:
        """The tokens, and whether each prompt fitted into them."""
        raise ValueError(f"{self.name} has no text side, and cannot read prompts")

    def _encode_tokens(self, tokens: Tensor) -> Tensor:
        raise ValueError(f"{self.name} has no text side, and cannot encode tokens")


def load_tower(model: str, pretrained: str | None = None) -> Tower:
    """The tower of these weights; the same object as long as anyone holds it.

    Args:
        model: ``"transformers:ORG/NAME"`` or ``"transformers:PATH"`` (CLIP, SigLIP); open_clip's
            ``"hf-hub:ORG/REPO"``, ``"local-dir:PATH"``, or an architecture such as
            ``"ViT-L-14"``; ``"embedded:clip_guide"``, ``"embedded:clip_judge"``; or the path of a
            folder in either layout.
        pretrained: for an architecture only: its open_clip tag (``"openai"``) or a checkpoint
            file.

    Raises:
        FileNotFoundError: the embedded asset, the folder or the checkpoint is missing.
        ValueError: an unknown architecture, no or unknown ``pretrained`` for an architecture
            (its weights would be random), ``pretrained`` beside a folder or hub id, or a
            checkpoint that lacks weights.
        RuntimeError, OSError: the weights could not be loaded or downloaded.
    """
    if model.startswith("embedded:"):
        return load_open_clip(model, pretrained)
    if not model.startswith(("transformers:", "local-dir:", "hf-hub:")):
        folder = Path(model)
        if (folder / "open_clip_config.json").is_file():
            model = f"local-dir:{model}"
        elif (folder / "config.json").is_file():
            model = f"transformers:{model}"
    if not model.startswith("transformers:"):
        return load_open_clip(model, pretrained)
    if pretrained is not None:
        raise ValueError(f"{model!r} has its own weights; leave out pretrained={pretrained!r}")
    return load_transformers(model.removeprefix("transformers:"))


def _remember(key: Hashable, load: Callable[[], Tower]) -> Tower:
    tower = _TOWERS.get(key)
    if tower is None:
        # Not in the caller's inference mode: the weights must stay usable for gradients.
        with torch.inference_mode(False):
            tower = _TOWERS[key] = load()
    return tower


# -- open_clip ---------------------------------------------------------------------------------


def load_open_clip(model: str, pretrained: str | None = None) -> Tower:
    """A tower in open_clip; the arguments and errors are those of :func:`load_tower`."""
    name = model if pretrained is None else f"{model} ({pretrained})"
    if model.startswith("embedded:"):
        model = f"local-dir:{asset_path(model.removeprefix('embedded:'))}"
    quick_gelu = False
    if model.startswith(("local-dir:", "hf-hub:")):
        if pretrained is not None:
            raise ValueError(f"{model!r} has its own weights; leave out pretrained={pretrained!r}")
        if model.startswith("local-dir:"):
            folder = Path(model.removeprefix("local-dir:")).expanduser().resolve()
            config = folder / "open_clip_config.json"
            if not config.is_file():
                raise FileNotFoundError(f"{config} is missing: not a folder saved by open_clip")
            model = f"local-dir:{folder}"
    else:
        model = model.replace("/", "-")
        pretrained, quick_gelu = _open_clip_weights(model, pretrained)

    def load() -> Tower:
        import open_clip

        network = open_clip.create_model(
            model, pretrained=pretrained, require_pretrained=True, force_quick_gelu=quick_gelu
        )
        return _OpenClip(key, name, network, open_clip.get_tokenizer(model))

    key = ("open_clip", model, pretrained)
    return _remember(key, load)


def _open_clip_weights(model: str, pretrained: str | None) -> tuple[str, bool]:
    """Tag or file of an architecture's weights, and whether they need QuickGELU."""
    import open_clip

    if model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=3)
        raise ValueError(
            f"open_clip has no architecture {model!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "")
            + " (For a folder write 'local-dir:PATH', for the hub 'hf-hub:ORG/REPO', for either "
            "in transformers' layout 'transformers:...'.)"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags:
        # open_clip only warns when a tag was trained with another GELU than the architecture's.
        return pretrained, bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu"))
    if pretrained is None or not Path(pretrained).is_file():
        came = "none came" if pretrained is None else f"{pretrained!r} is neither"
        raise ValueError(
            f"{model!r} needs pretrained=, a checkpoint file or one of "
            f"{', '.join(tags) or '(no tags)'}; {came}"
        )
    return str(Path(pretrained).resolve()), False


class _OpenClip(Tower):
    def __init__(self, key: Hashable, name: str, network: nn.Module, tokenizer: Callable) -> None:
        cfg = network.visual.preprocess_cfg
        size = cfg["size"]
        preprocess = Preprocess(
            size=(size, size) if isinstance(size, int) else tuple(size),
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            interpolation="bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
            resize_mode=cfg["resize_mode"],
            fill=cfg["fill_color"] / 255,
        )
        super().__init__(key, name, network, preprocess)
        self._tokenizer = tokenizer

    def _encode_images(self, prepared: Tensor) -> Tensor:
        return self.network.encode_image(prepared)

    def _encode_tokens(self, tokens: Tensor) -> Tensor:
        return self.network.encode_text(tokens)

    def _tokenize(self, prompts: list[str]) -> tuple[Tensor, list[bool]]:
        tokens = self._tokenizer(prompts)
        length = tokens.shape[1]
        # "clips" rows end in a class token: not comparable.
        if getattr(self._tokenizer, "tokenizer_mode", ""):
            return tokens, [True] * len(prompts)
        # open_clip truncates silently. With more room, a prompt that fits has padding (or its
        # end) at the last place of the short row, as the short row has; one that does not fit
        # has a word there.
        roomy = self._tokenizer(prompts, context_length=2 * length)
        return tokens, (tokens[:, -1] == roomy[:, length - 1]).tolist()


# -- transformers ------------------------------------------------------------------------------


def load_transformers(model: str, processor: str | None = None, text: bool = True) -> Tower:
    """A CLIP or SigLIP tower in transformers.

    Args:
        model: hub id or folder.
        processor: hub id or folder of the tokenizer and the image processor's settings; by
            default ``model``.
        text: False: the tower of a SigLIP may come without its text side.

    Raises:
        FileNotFoundError: the folder, its ``config.json``, its tokenizer or its image processor
            is missing, or cannot be downloaded.
        ValueError: not a model that embeds images and text, a checkpoint that lacks weights, or
            preprocessing which :class:`Preprocess` cannot express.
        OSError: the weights themselves could not be found or downloaded.
    """
    model, processor = _located(model), _located(processor or model)
    whole = ("transformers", model, processor)
    if text or whole in _TOWERS:
        return _remember(whole, lambda: _Transformers(whole, model, processor, text=True))
    key = (*whole, "vision")
    return _remember(key, lambda: _Transformers(key, model, processor, text=False))


def _located(name: str) -> str:
    """A folder's full path; a hub id as it is."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"there is no folder {name}")
    return name


class _Transformers(Tower):
    def __init__(self, key: Hashable, model: str, processor: str, text: bool) -> None:
        import transformers

        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise FileNotFoundError(
                f"{model}/config.json is missing: not a folder saved by transformers"
            )
        try:
            kind = transformers.AutoConfig.from_pretrained(model).model_type
        except OSError as err:  # whose message does not always name it
            raise FileNotFoundError(
                f"{model!r} is no folder here and could not be had from the hub: {err}"
            ) from err
        only_vision = kind == "siglip_vision_model" or (kind == "siglip" and not text)
        auto = transformers.SiglipVisionModel if only_vision else transformers.AutoModel
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # else it lists every weight of the text side
        try:
            network, report = auto.from_pretrained(
                model, dtype=torch.float32, output_loading_info=True
            )
        finally:
            transformers.logging.set_verbosity(verbosity)
        lacking = sorted(report["missing_keys"])
        if lacking:  # transformers gives them random weights
            raise ValueError(
                f"the checkpoint {model!r} lacks {len(lacking)} weights of its {kind} network, "
                f"the first of them {lacking[0]}"
            )
        needed = ["get_image_features", *(["get_text_features"] if text else [])]
        if not only_vision and not all(hasattr(network, method) for method in needed):
            raise ValueError(f"{model!r} is a {kind} model, which does not embed images and text")
        self._only_vision = only_vision
        self._tokenizer = None
        try:
            settings = transformers.AutoImageProcessor.from_pretrained(processor)
            if text and not only_vision:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(processor)
        except (OSError, ValueError) as err:
            raise FileNotFoundError(
                f"{processor!r} must hold the image processor and tokenizer of {model!r}, but "
                f"they cannot be loaded: {err}"
            ) from err
        super().__init__(key, f"transformers:{model}", network, _from_settings(settings, processor))

    def _encode_images(self, prepared: Tensor) -> Tensor:
        encode = self.network if self._only_vision else self.network.get_image_features
        return _pooled(encode(pixel_values=prepared))

    def _encode_tokens(self, tokens: Tensor) -> Tensor:
        return _pooled(self.network.get_text_features(input_ids=tokens))

    def _tokenize(self, prompts: list[str]) -> tuple[Tensor, list[bool]]:
        if self._tokenizer is None:
            return super()._tokenize(prompts)
        # Padded to full length always: SigLIP was trained so, and CLIP does not look past the
        # end of the prompt. No mask: neither needs one then.
        length = self.network.config.text_config.max_position_embeddings
        whole = [len(ids) <= length for ids in self._tokenizer(prompts)["input_ids"]]
        batch = self._tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return batch["input_ids"], whole


def _pooled(output: Any) -> Tensor:
    """transformers 5 returns a record where 4 returned the features."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _from_settings(settings: Any, name: str) -> Preprocess:
    """An image processor's settings as a :class:`Preprocess`."""
    filters = {2: "bilinear", 3: "bicubic"}
    size = dict(settings.size)
    side = size.get("shortest_edge")
    size = (side, side) if side else (size.get("height"), size.get("width"))
    cropped = bool(getattr(settings, "do_center_crop", False))
    crop = dict(settings.crop_size) if cropped else {}
    same = not cropped or (crop.get("height"), crop.get("width")) == size
    if None in size or int(settings.resample) not in filters or not same or (side and not cropped):
        raise ValueError(
            f"the image processor of {name!r} is not one of those known here: size "
            f"{dict(settings.size)}, crop {crop or None}, resample {settings.resample}"
        )
    return Preprocess(
        size=size,
        mean=tuple(settings.image_mean),
        std=tuple(settings.image_std),
        interpolation=filters[int(settings.resample)],
        resize_mode="shortest" if side else "squash",
        floor=True,
    )


# --------------------------------------------------------------------------------------------
# Rewards that have a tower
# --------------------------------------------------------------------------------------------


class TowerReward(ABC):
    """A reward on top of a tower's features; a subclass gives :meth:`score_prepared`.

    Args:
        info: with ``exact``, its ``differentiable`` becomes False.
        tower: shared with whoever else named the same weights.
        preprocess: by default the tower's.
        exact: preprocess as the original does, through PIL and 8 bits, without gradient.
        chunk_size: images (or new prompts) given to the network at once.
    """

    def __init__(
        self,
        info: RewardInfo,
        tower: Tower,
        *,
        preprocess: Preprocess | None = None,
        exact: bool = False,
        chunk_size: int = 64,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but {chunk_size} came")
        self.info = replace(info, differentiable=False) if exact else info
        self.tower = tower
        self.preprocess = replace(preprocess or tower.preprocess, exact=exact)
        self.chunk_size = chunk_size

    def __call__(self, samples: Samples) -> Scores:
        return self.score_prepared(self.preprocess(samples.data), samples.prompts)

    @abstractmethod
    def score_prepared(
        self, prepared: Float[Tensor, "b 3 H W"], prompts: Sequence[str] | None = None
    ) -> Scores:
        """The scores of images which went through ``preprocess`` already."""

    def to(self, device: torch.device | str) -> "TowerReward":
        """Move the network; a call does this by itself to where its samples are."""
        self.tower.to(device)
        return self

    def encode(self, prepared: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d"]:
        """Unit-norm embeddings of preprocessed images, differentiable."""
        return F.normalize(self.tower.encode(prepared, self.chunk_size), dim=-1)

    def image_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit-norm image embeddings, differentiable (unless exact)."""
        return self.encode(self.preprocess(images))

    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit-norm prompt embeddings, without gradient."""
        return F.normalize(self.tower.text_features(prompts, self.chunk_size), dim=-1)


class CosineReward(TowerReward):
    """``scale`` times the cosine of the embeddings of an image and its prompt."""

    def __init__(self, info: RewardInfo, tower: Tower, *, scale: float | int = 1.0, **options: Any):
        super().__init__(info, tower, **options)
        self.scale = scale

    def score_prepared(
        self, prepared: Float[Tensor, "b 3 H W"], prompts: Sequence[str] | None = None
    ) -> Scores:
        if prompts is None:
            raise ValueError(f"reward {self.info.name!r} compares images with prompts; none came")
        image = self.encode(prepared)  # first: it moves the tower to the images' device
        return Scores(self.scale * (image * self.text_features(prompts)).sum(dim=-1))
