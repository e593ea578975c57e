"""Encoders of images: CLIP and SigLIP, DINOv2, diffusion models' autoencoders, InceptionV3."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffreward._assets import asset_path
from diffreward.rewards.encoders import NetworkEncoder, register_encoder
from diffreward.rewards.towers import Preprocess, _from_settings, _located, load_tower
from diffreward.rewards.weights import weights_file
from diffreward.samples import Samples


def _resized(samples: Samples, preprocess: Preprocess) -> Samples:
    """Of the size that ``preprocess`` gives, and which it leaves as they are."""
    if preprocess.exact and not preprocess.clip:
        return samples  # rounds to 8 bits what comes, and would round again
    only = replace(preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return replace(samples, data=only(samples.data))


@register_encoder(
    "clip",
    modality="image",
    weights="embedded:clip_guide",
    licence="Apache-2.0 (embedded); otherwise that of the weights",
    source="Radford et al. 2021, arXiv:2103.00020",
)
class CLIP(NetworkEncoder):
    """Image tower of a CLIP or SigLIP; texts by its text tower.

    Parts are the patches: the image tower's last hidden states after its final normalisation, not
    projected, so of another dimension than the embedding and not comparable with texts.

    Args:
        model: what `diffreward.rewards.towers.load_tower` takes: ``"embedded:clip_guide"``,
            ``"embedded:clip_judge"``, a folder, ``"hf-hub:ORG/REPO"``, an open_clip architecture,
            or ``"transformers:ORG/NAME"``.
        pretrained: for an architecture: its open_clip tag or a checkpoint file.
        normalise: embeddings (not parts) of unit norm.
        exact: resize in PIL with 8 bits, as the originals do; without gradient.
        chunk_size: images (or texts) given to the network at once.
    """

    def __init__(
        self,
        model: str = "embedded:clip_guide",
        pretrained: str | None = None,
        normalise: bool = True,
        exact: bool = False,
        chunk_size: int = 64,
    ) -> None:
        self.tower = load_tower(model, pretrained)
        self.preprocess = replace(self.tower.preprocess, exact=exact)
        self.normalise, self.differentiable = normalise, not exact
        super().__init__(self.tower.network, chunk_size, self.preprocess, normalise)

    def __call__(self, samples: Samples) -> Float[Tensor, "b d"]:
        prepared = self.preprocess(samples.data)
        return self._scaled(self.tower.encode(prepared, self.chunk_size))

    def parts(self, samples: Samples) -> Float[Tensor, "b n d"]:
        """Of the patches, row by row."""
        prepared = self.preprocess(samples.data)
        return self.chunked(functools.partial(_patches, self.network), prepared)

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Embeddings of texts, comparable with those of images."""
        return self._scaled(self.tower.text_features(list(texts), self.chunk_size))

    def resized(self, samples: Samples) -> Samples:
        """Of the network's size."""
        return _resized(samples, self.preprocess)

    def to(self, device: torch.device | str) -> "CLIP":
        """Move the tower, with what it remembers."""
        self.tower.to(device)
        return self

    def _scaled(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) if self.normalise else features


def _patches(network: nn.Module, prepared: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n d"]:
    """Last hidden states of the patches, normalised by the tower's last layer norm."""
    visual = getattr(network, "visual", None)
    if visual is None:  # transformers
        vision = getattr(network, "vision_model", network)
        hidden = vision(pixel_values=prepared).last_hidden_state
        side = vision.config.patch_size
        patches = (prepared.shape[-2] // side) * (prepared.shape[-1] // side)
        if hidden.shape[1] == patches:  # SigLIP, normalised already
            return hidden
        return vision.post_layernorm(hidden[:, -patches:])
    if not hasattr(visual, "forward_intermediates") or getattr(visual, "attn_pool", None):
        raise ValueError(
            f"the image tower {type(visual).__name__} has no patches that are embedded by "
            "themselves; choose a vision transformer without attention pooling"
        )
    found = visual.forward_intermediates(
        prepared, indices=1, normalize_intermediates=True, intermediates_only=True
    )
    return found["image_intermediates"][-1].flatten(2).transpose(1, 2)


@register_encoder(
    "dino",
    modality="image",
    weights="facebook/dinov2-base, or another DINO",
    licence="Apache-2.0 (DINOv2); otherwise that of the weights",
    source="Oquab et al. 2023 (DINOv2), arXiv:2304.07193",
)
class DINO(NetworkEncoder):
    """DINOv2's class token; parts are its patches.

    Both after the final layer norm. Registers are left out.

    Args:
        model: a vision transformer of transformers with a class token: a folder saved by
            ``save_pretrained``, or a hub id.
        size: images are resized to cover a square of this side, in pixels, and cropped to it, a
            multiple of the patch size; by default what the model's image processor does.
        chunk_size: images given to the network at once.

    Raises:
        FileNotFoundError: there is no such folder, and it could not be had from the hub.
        ValueError: the checkpoint lacks weights, it is no such network, or preprocessing that
            `Preprocess` cannot express.
    """

    def __init__(
        self,
        model: str = "facebook/dinov2-base",
        size: int | None = None,
        chunk_size: int = 32,
    ) -> None:
        import transformers

        name = _located(model)
        try:
            settings = transformers.AutoImageProcessor.from_pretrained(name)
            network, report = transformers.AutoModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
        except OSError as err:
            raise FileNotFoundError(
                f"{model!r} is no folder of a network and its image processor, and could not be "
                f"had from the hub: {' '.join(str(err).split())}"
            ) from err
        _refuse_random(model, [k for k in report["missing_keys"] if not k.startswith("pooler.")])
        self.patch_size = getattr(network.config, "patch_size", None)
        if not isinstance(self.patch_size, int):
            raise ValueError(f"{model!r} is a {network.config.model_type}, no vision transformer")
        self.preprocess, self.margin = _resize_and_crop(settings, model, size)
        if size is not None and size % self.patch_size:
            raise ValueError(
                f"size must be a multiple of the patch size {self.patch_size}, but {size} came"
            )
        super().__init__(network, chunk_size, self.preprocess, self.margin)

    def __call__(self, samples: Samples) -> Float[Tensor, "b d"]:
        return self._states(samples, lambda hidden, _: hidden[:, 0])

    def parts(self, samples: Samples) -> Float[Tensor, "b n d"]:
        """Of the patches, row by row."""
        return self._states(samples, lambda hidden, patches: hidden[:, -patches:])

    def resized(self, samples: Samples) -> Samples:
        """Of the network's size."""
        return _resized(samples, self.preprocess)

    def _states(self, samples: Samples, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        prepared = self.preprocess(samples.data)
        if self.margin:
            inside = slice(self.margin, -self.margin)
            prepared = prepared[..., inside, inside]
        h, w = prepared.shape[-2:]
        patches = (h // self.patch_size) * (w // self.patch_size)

        def states(x: Tensor) -> Tensor:
            hidden = self.network(pixel_values=x).last_hidden_state
            if hidden.shape[1] <= patches:
                raise ValueError(f"{type(self.network).__name__} has no class token")
            return choose(hidden, patches)

        return self.chunked(states, prepared)


def _resize_and_crop(settings: Any, model: str, size: int | None) -> tuple[Preprocess, int]:
    """An image processor's settings, and by how much to crop each side after them."""
    side, crop = dict(settings.size).get("shortest_edge"), getattr(settings, "crop_size", None)
    crop = dict(crop or {})
    if side is None or not getattr(settings, "do_center_crop", False):
        preprocess, margin = _from_settings(settings, model), 0
    else:
        # The centre of the centre; the same as one crop if what is cut off is even.
        margin, odd = divmod(side - crop["height"], 2)
        filters = {2: "bilinear", 3: "bicubic"}
        known = crop["height"] == crop["width"] and margin >= 0 and not odd
        if not known or int(settings.resample) not in filters:
            raise ValueError(
                f"the image processor of {model!r} is not one of those known here: size "
                f"{dict(settings.size)}, crop {crop}, resample {settings.resample}"
            )
        preprocess = Preprocess(
            size=(side, side),
            mean=tuple(settings.image_mean),
            std=tuple(settings.image_std),
            interpolation=filters[int(settings.resample)],
            floor=True,
        )
    if size is not None:
        preprocess, margin = replace(preprocess, size=(size, size)), 0
    return preprocess, margin


def _refuse_random(model: str, missing: Sequence[str]) -> None:
    if missing:
        raise ValueError(
            f"the checkpoint {model!r} lacks {len(missing)} weights, the first of them "
            f"{min(missing)}: they would be random"
        )


@register_encoder(
    "vae",
    modality="image",
    weights="embedded:emoji",
    licence="Apache-2.0 (embedded); otherwise that of the weights",
    source="Rombach et al. 2022, arXiv:2112.10752",
)
class VAE(NetworkEncoder):
    """Mean latents of a diffusion model's autoencoder; parts are its spatial positions.

    As the diffusion model sees them: of zero shift and unit scale.

    Args:
        model: a diffusers ``AutoencoderKL``: its folder or hub id, or a pipeline's folder;
            ``"embedded:emoji"``; or the module itself, as a policy's own.
        pool: ``"mean"``, over the positions, (b, channels); or ``"flatten"``, (b, channels times
            height times width), which keeps where things are and needs images of one size.
        size: images are resized to a square of this side, in pixels; by default they are taken as
            they are.
        subfolder: of the hub's pipeline, as a rule ``"vae"``.
        chunk_size: images given to the network at once.

    Raises:
        FileNotFoundError: there is no such folder, and it could not be had from the hub.
        ValueError: the checkpoint lacks weights, or an unknown ``pool``.
    """

    def __init__(
        self,
        model: str | nn.Module = "embedded:emoji",
        pool: str = "mean",
        size: int | None = None,
        subfolder: str | None = None,
        chunk_size: int = 32,
    ) -> None:
        if pool not in ("mean", "flatten"):
            raise ValueError(f"pool is mean or flatten, but {pool!r} came")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1, but {size} came")
        network = _load_vae(model, subfolder) if isinstance(model, str) else model
        self.pool = pool
        half = (0.5, 0.5, 0.5)
        self.resize = size and Preprocess((size, size), half, half, resize_mode="squash")
        config = network.config
        self.shift, self.scale = config.shift_factor or 0.0, config.scaling_factor
        super().__init__(network, chunk_size, pool, size, self.shift, self.scale)

    def __call__(self, samples: Samples) -> Float[Tensor, "b d"]:
        latents = self._latents(samples.data)
        return latents.mean(dim=(2, 3)) if self.pool == "mean" else latents.flatten(1)

    def parts(self, samples: Samples) -> Float[Tensor, "b n d"]:
        """Of the latent's positions, row by row."""
        return self._latents(samples.data).flatten(2).transpose(1, 2)

    def resized(self, samples: Samples) -> Samples:
        """Of the option's size, where there is one."""
        return _resized(samples, self.resize) if self.resize else samples

    def _latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c x y"]:
        prepared = self.resize(images) if self.resize else 2 * images - 1
        mean = self.chunked(lambda x: self.network.encode(x).latent_dist.mean, prepared)
        return (mean - self.shift) * self.scale


def _load_vae(model: str, subfolder: str | None) -> nn.Module:
    import diffusers

    if model.startswith("embedded:"):
        name = str(asset_path(model.removeprefix("embedded:")))
    else:
        name = _located(model)
    if subfolder is None and (Path(name) / "vae" / "config.json").is_file():
        subfolder = "vae"
    try:
        network, report = diffusers.AutoencoderKL.from_pretrained(
            name, subfolder=subfolder, torch_dtype=torch.float32, output_loading_info=True
        )
    except OSError as err:
        raise FileNotFoundError(
            f"{model!r} is no folder of an AutoencoderKL, and could not be had from the hub (of a "
            f"pipeline there give subfolder='vae'): {' '.join(str(err).split())}"
        ) from err
    _refuse_random(model, report["missing_keys"])
    return network


@register_encoder(
    "inception",
    modality="image",
    weights="InceptionV3 of torch-fidelity, downloaded",
    licence="Apache-2.0 (TensorFlow's weights)",
    source="Heusel et al. 2017 (FID), arXiv:1706.08500; Obukhov et al. 2020 (torch-fidelity)",
)
class Inception(NetworkEncoder):
    """InceptionV3's 2048 pooled features, as FID has them, by torch-fidelity.

    Args:
        weights: a file of torch-fidelity's weights; by default downloaded once.
        exact: round images to 8 bits, as FID does of files; without gradient.
        chunk_size: images given to the network at once.

    Raises:
        ImportError: torch-fidelity is not installed.
        FileNotFoundError: the weights are not there, or cannot be downloaded.
    """

    def __init__(
        self, weights: str | None = None, exact: bool = False, chunk_size: int = 32
    ) -> None:
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except ImportError as err:
            raise ImportError(
                f"encoder 'inception' needs torch-fidelity ({err}): pip install "
                "'diffreward[inception]'"
            ) from err
        file = weights_file(weights or fidelity.URL_INCEPTION_V3)
        torch.load(file, map_location="cpu", weights_only=True)  # refuses pickled code; they do not
        network = fidelity.FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=file
        )
        self.differentiable = not exact
        self.exact, self._resize = exact, fidelity.interpolate_bilinear_2d_like_tensorflow1x
        super().__init__(network, chunk_size, exact)

    def __call__(self, samples: Samples) -> Float[Tensor, "b 2048"]:
        if self.exact:
            pixels = (samples.data.detach() * 255).round().clamp(0, 255).to(torch.uint8)
            return self.chunked(lambda x: self.network(x)[0], pixels)
        return self.chunked(self._of_floats, samples.data)

    def resized(self, samples: Samples) -> Samples:
        """Of the network's size; as they are if they are to be rounded before that."""
        return samples if self.exact else replace(samples, data=self._sized(samples.data))

    def _sized(self, images: Tensor) -> Tensor:
        side = self.network.INPUT_IMAGE_SIZE
        return self._resize(images, size=(side, side), align_corners=False)

    def _of_floats(self, images: Tensor) -> Tensor:
        """What it makes of images that are not rounded: they take the place of its first input."""
        prepared = (self._sized(images * 255) - 128) / 128
        blank = torch.zeros(prepared.shape, dtype=torch.uint8, device=images.device)
        hook = self.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: (prepared,))
        try:
            return self.network(blank)[0]
        finally:
            hook.remove()
