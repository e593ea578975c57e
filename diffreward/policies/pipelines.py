"""Policies from diffusers pipelines: one small class per family.

A family says how a pipeline encodes prompts, which network is called with what, and how latents
become images, all by the pipeline's own parts. What the sampler does with the network's output is
the kernel's business (`gaussian.py`). Nothing of the pipeline is changed: timesteps come from a
fresh scheduler of the same configuration.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.policies.gaussian import DDIM, DDPM, FlowRenoise, FlowSDE, GaussianPolicy
from diffreward.policy import Condition, Generators, randn
from diffreward.samples import Samples

VP_KERNELS = ("ddim", "ddpm")
FLOW_KERNELS = ("flow_sde", "flow_renoise")


@dataclass(frozen=True)
class Sampling:
    """Sampler options of `load_pipeline`; see there."""

    num_steps: int = 25
    kernel: str | None = None
    eta: float = 1.0
    noise_level: float = 0.7


class PipelinePolicy(GaussianPolicy):
    """A `GaussianPolicy` over a diffusers pipeline; subclasses are the families.

    Attributes:
        pipe: the pipeline, unchanged.
        denoiser: the network that is trained.
        guidance_scale: as in diffusers.
        guided: whether each prediction is made with and without the prompt.
    """

    network = "unet"
    kernels = VP_KERNELS
    shared: tuple[str, ...] = ()  #: what of a condition guidance takes as it is for both halves
    _parked = False

    def __init__(
        self, pipe, sampling: Sampling, guidance_scale=1.0, negative_prompt="", height=None,
        width=None,
    ) -> None:  # fmt: skip
        self.pipe, self.guidance_scale, self.negative_prompt = pipe, guidance_scale, negative_prompt
        self.denoiser = getattr(pipe, self.network)
        channels = [self.denoiser.config.get(f"{way}_channels") for way in ("in", "out")]
        if channels[1] not in (None, channels[0]):
            raise ValueError(
                f"the {self.network} takes {channels[0]} channels and returns {channels[1]}: "
                "networks that predict variances too, or take more than latents, are not supported"
            )
        self.height, self.width = self._size(height, width)
        self.guided = self._is_guided()
        name = sampling.kernel or self.kernels[0]
        if name not in self.kernels:
            raise ValueError(
                f"kernel {name!r} does not fit {type(pipe).__name__}, whose kernels are "
                f"{', '.join(self.kernels)}"
            )
        options = self._timestep_options(sampling)
        self.kernel = build_kernel(pipe.scheduler, name, sampling, **options)

    @property
    def base(self) -> torch.nn.Module:
        """The network that predicts; another than ``denoiser`` if what controls it is trained."""
        return self.denoiser

    def _size(self, height, width) -> tuple[int, int]:
        size, scale = self.base.config.sample_size, self._scale()
        own = (size, size) if isinstance(size, int) else size
        return _multiples(height or own[0] * scale, width or own[1] * scale, scale)

    def _scale(self) -> int:
        return self.pipe.vae_scale_factor

    def _is_guided(self) -> bool:
        return self.guidance_scale > 1 and self.base.config.get("time_cond_proj_dim") is None

    def _timestep_options(self, sampling: Sampling) -> dict[str, Any]:
        # latents are not bounded by 1: DDIM's default clipping is for pixels
        return {"clip_sample": self.pipe.scheduler.config.get("clip_sample", False)}

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        scale = self._scale()
        return (self.base.config.in_channels, self.height // scale, self.width // scale)

    def encode(self, prompts: Sequence[str], **inputs) -> Condition:
        if inputs:
            hint = ""
            if "control" in inputs:
                hint = "; for a control image, load it with controlnet=... or adapter=..."
            raise ValueError(
                f"{type(self.pipe).__name__} takes prompts only, but {', '.join(inputs)} came{hint}"
            )
        prompts = self._listed(prompts)
        if self._parked:
            self._move_encoders(self.device)
        tensors = {k: v for k, v in self._embed(prompts).items() if v is not None}
        if self._parked:
            self._move_encoders("cpu")
        return Condition(prompts, {k: v.detach().to(self.dtype) for k, v in tensors.items()})

    @staticmethod
    def _listed(prompts: Sequence[str]) -> list[str]:
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"encode takes a list of prompts, at least one, but {prompts!r} came")
        return list(prompts)

    def park_encoders(self, parked: bool = True) -> None:
        """Keep the text encoders in main memory except while they encode, or no longer."""
        self._parked = parked
        self._move_encoders("cpu" if parked else self.device)

    def _move_encoders(self, device: torch.device | str) -> None:
        for name, module in self.pipe.components.items():
            if name.startswith("text_encoder") and module is not None:
                module.to(device)

    def _embed(self, prompts: list[str]) -> dict[str, Tensor | None]:
        raise NotImplementedError

    def decode(self, x0: Tensor, condition: Condition) -> Samples:
        images = decode_vae(self.pipe.vae, x0)
        return Samples((images / 2 + 0.5).clamp(0, 1), "image", list(condition.prompts))

    def encode_samples(self, samples: Samples) -> Tensor:
        """The latents of pictures: what `decode` undoes, as well as the autoencoder can.

        Raises:
            ValueError: samples of another modality, or pictures of another size.
        """
        return encode_vae(self.pipe.vae, self._pixels(samples))

    def _pixels(self, samples: Samples) -> Float[Tensor, "b 3 h w"]:
        """Pictures of the model's size, in [-1, 1], on its device."""
        if samples.modality != "image":
            raise ValueError(f"this model makes images, but {samples.modality} samples came")
        came, own = tuple(samples.data.shape[-2:]), (self.height, self.width)
        if came != own:
            raise ValueError(
                f"this model's pictures are {own[0]}x{own[1]}, but {came[0]}x{came[1]} came; "
                "resize them, or load the model with this height and width"
            )
        return samples.data.to(self.device) * 2 - 1

    def _guide(self, x: Tensor, t: Tensor, condition: Condition, names: Sequence[str], call):
        """``call(x, t, tensors)``, with classifier-free guidance in one batch of twice the size."""
        c = condition.tensors
        if not self.guided:
            return call(x, t, {name: c[name] for name in (*names, *self.shared)})
        both = {name: torch.cat([c[f"negative_{name}"], c[name]]) for name in names}
        both |= {name: torch.cat([c[name], c[name]]) for name in self.shared}
        without, with_prompt = call(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + self.guidance_scale * (with_prompt - without)

    def _network(self, c: Mapping[str, Tensor], *args, **inputs) -> Tensor:
        """The base network's output; ``c`` is for those that are controlled."""
        return self.base(*args, **inputs).sample

    def _guidance_embedding(self, x: Tensor) -> Tensor | None:
        """The scale as an input of the network, for guidance-distilled models."""
        dim = self.base.config.get("time_cond_proj_dim")
        if dim is None:
            return None
        scale = torch.full((len(x),), self.guidance_scale - 1)
        return self.pipe.get_guidance_scale_embedding(scale, embedding_dim=dim).to(x)


class StableDiffusionPolicy(PipelinePolicy):
    """Stable Diffusion 1.x and 2.x."""

    def _embed(self, prompts):
        positive, negative = self.pipe.encode_prompt(
            prompts, self.device, 1, self.guided, [self.negative_prompt] * len(prompts)
        )
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        def call(x, t, c):
            cond = self._guidance_embedding(x)
            return self._network(
                c, x, t, encoder_hidden_states=c["prompt_embeds"], timestep_cond=cond
            )

        return self._guide(x, t, condition, ["prompt_embeds"], call)


class StableDiffusionXLPolicy(PipelinePolicy):
    """Stable Diffusion XL, at its own size and without crops."""

    def _embed(self, prompts):
        positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=self.guided,
            # no negative prompt at all is zeros, where the pipeline's config says so
            negative_prompt=[self.negative_prompt] * len(prompts) if self.negative_prompt else None,
        )
        size = (self.height, self.width)
        encoder = self.pipe.text_encoder_2
        dim = pooled.shape[-1] if encoder is None else encoder.config.projection_dim
        ids = self.pipe._get_add_time_ids(
            size, (0, 0), size, dtype=positive.dtype, text_encoder_projection_dim=dim
        )
        ids = ids.to(self.device).expand(len(prompts), -1)
        return {
            "prompt_embeds": positive,
            "negative_prompt_embeds": negative,
            "text_embeds": pooled,
            "negative_text_embeds": negative_pooled,
            "time_ids": ids,
            "negative_time_ids": ids,
        }

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        def call(x, t, c):
            return self._network(
                c,
                x,
                t,
                encoder_hidden_states=c["prompt_embeds"],
                timestep_cond=self._guidance_embedding(x),
                added_cond_kwargs={"text_embeds": c["text_embeds"], "time_ids": c["time_ids"]},
            )

        return self._guide(x, t, condition, ["prompt_embeds", "text_embeds", "time_ids"], call)


class StableDiffusion3Policy(PipelinePolicy):
    """Stable Diffusion 3 and 3.5."""

    network = "transformer"
    kernels = FLOW_KERNELS

    def _size(self, height, width):
        height, width = super()._size(height, width)
        return _multiples(height, width, self._scale() * self.base.config.patch_size)

    def _timestep_options(self, sampling):
        if not self.pipe.scheduler.config.get("use_dynamic_shifting"):
            return {}
        patch = self._scale() * self.base.config.patch_size
        tokens = (self.height // patch) * (self.width // patch)
        return {"mu": _shift(self.pipe.scheduler, tokens, 1.16)}

    def _embed(self, prompts):
        positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=self.guided,
            negative_prompt=[self.negative_prompt] * len(prompts),
        )
        return {
            "prompt_embeds": positive,
            "negative_prompt_embeds": negative,
            "pooled": pooled,
            "negative_pooled": negative_pooled,
        }

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        def call(x, t, c):
            return self._network(
                c,
                hidden_states=x,
                timestep=t,
                encoder_hidden_states=c["prompt_embeds"],
                pooled_projections=c["pooled"],
            )

        return self._guide(x, t, condition, ["prompt_embeds", "pooled"], call)


class FluxPolicy(PipelinePolicy):
    """FLUX.1: guidance is an input of the network (dev) or distilled away (schnell)."""

    network = "transformer"
    kernels = FLOW_KERNELS

    def _size(self, height, width):
        own = self.pipe.default_sample_size * self._scale()
        return _multiples(height or own, width or own, 2 * self._scale())

    def _is_guided(self):
        return False

    def _grid(self) -> tuple[int, int]:
        """Height and width in packed latents: patches of 2 x 2."""
        scale = 2 * self._scale()
        return self.height // scale, self.width // scale

    def _timestep_options(self, sampling):
        n, (h, w) = sampling.num_steps, self._grid()
        sigmas = torch.linspace(1.0, 1 / n, n).tolist()
        return {"sigmas": sigmas, "mu": _shift(self.pipe.scheduler, h * w, 1.15)}

    def _embed(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, device=self.device)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        h, w = self._grid()
        return (h * w, self.base.config.in_channels)

    def initial(self, condition: Condition, generator: Generators = None) -> Tensor:
        # drawn as a map and then packed, as the pipeline does
        (h, w), channels = self._grid(), self.base.config.in_channels // 4
        shape = (len(condition), channels, 2 * h, 2 * w)
        return self.pipe._pack_latents(randn(shape, generator, device=self.device), *shape)

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        embeds, (h, w) = condition.tensors["prompt_embeds"], self._grid()
        return self._network(
            condition.tensors,
            hidden_states=x,
            timestep=t.to(x.dtype) / 1000,
            guidance=self._guidance_input(self.base, x),
            pooled_projections=condition.tensors["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(len(x), h, w, x.device, x.dtype),
        )

    def _guidance_input(self, network: torch.nn.Module, x: Tensor) -> Tensor | None:
        if not network.config.guidance_embeds:
            return None
        return torch.full((len(x),), self.guidance_scale, device=x.device)

    def decode(self, x0: Tensor, condition: Condition) -> Samples:
        x0 = self.pipe._unpack_latents(x0, self.height, self.width, self._scale())
        return super().decode(x0, condition)

    def encode_samples(self, samples: Samples) -> Tensor:
        latents = super().encode_samples(samples)
        return self.pipe._pack_latents(latents, *latents.shape)


class UnconditionalPolicy(PipelinePolicy):
    """Unconditional pixel models (UNet2D); prompts are empty strings. Grey becomes RGB."""

    def __init__(self, pipe, *args, **kwargs) -> None:
        super().__init__(pipe, *args, **kwargs)
        if (channels := self.denoiser.config.in_channels) not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, but this model's have {channels}")

    def _scale(self):
        return 1

    def _timestep_options(self, sampling):
        return {}

    def _embed(self, prompts):
        return {}

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(x, t).sample

    def decode(self, x0: Tensor, condition: Condition) -> Samples:
        images = (x0.float() / 2 + 0.5).clamp(0, 1)
        return Samples(images.expand(-1, 3, -1, -1), "image", list(condition.prompts))

    def encode_samples(self, samples: Samples) -> Tensor:
        pixels = self._pixels(samples)
        return pixels if self.denoiser.config.in_channels == 3 else pixels.mean(1, keepdim=True)


class AncestralPolicy(UnconditionalPolicy):
    """The same with the ancestral kernel as its default."""

    kernels = VP_KERNELS[::-1]


FAMILIES: dict[str, type[PipelinePolicy]] = {
    "StableDiffusionPipeline": StableDiffusionPolicy,
    "StableDiffusionXLPipeline": StableDiffusionXLPolicy,
    "StableDiffusion3Pipeline": StableDiffusion3Policy,
    "FluxPipeline": FluxPolicy,
    "DDPMPipeline": AncestralPolicy,
    "DDIMPipeline": UnconditionalPolicy,
}
"""Class name of a diffusers pipeline -> its policy."""


def build_kernel(scheduler: Any, name: str, sampling: Sampling, **options):
    """The kernel ``name`` on the timesteps of a fresh scheduler of the same configuration.

    Args:
        scheduler: the pipeline's; only its configuration is read.
        name: see `load_pipeline`.
        sampling: number of steps and noise.
        **options: ``clip_sample``; or ``sigmas`` and ``mu`` of a flow-matching schedule.

    Raises:
        ValueError: a scheduler of another path (flow matching, EDM), an inverted one, dynamic
            thresholding, a learned variance, an unknown prediction type, too many steps.
    """
    import diffusers

    config, steps = scheduler.config, sampling.num_steps
    flow = name in FLOW_KERNELS
    # what one path's schedulers cannot be without: elsewhere from_config would fill in defaults
    if ("shift" if flow else "beta_schedule") not in config or config.get("invert_sigmas"):
        wanted = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
        raise ValueError(
            f"no {name} kernel can be made of the configuration of {type(scheduler).__name__}; "
            f"give the pipeline a {wanted} with the settings the model was trained with"
        )
    if flow:
        grid = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        sigmas = options.pop("sigmas", None)
        grid.set_timesteps(None if sigmas else steps, sigmas=sigmas, **options)
        common = (grid.timesteps, grid.sigmas, grid.config.num_train_timesteps)
        if name == "flow_renoise":
            return FlowRenoise(*common)
        return FlowSDE(*common, noise_level=sampling.noise_level)

    if config.get("thresholding"):
        raise ValueError("the scheduler's dynamic thresholding is not supported; switch it off")
    prediction, known = config.get("prediction_type"), ("epsilon", "v_prediction", "sample")
    if prediction not in known:
        raise ValueError(f"prediction_type must be one of {known}, but {prediction!r} came")
    cls = diffusers.DDIMScheduler if name == "ddim" else diffusers.DDPMScheduler
    grid = cls.from_config(config, **options)
    grid.set_timesteps(steps)
    t, table = grid.timesteps, grid.alphas_cumprod
    if t[0] >= len(table):
        raise ValueError(f"{steps} steps reach beyond the {len(table)} of training; take fewer")
    if name == "ddim":
        # diffusers steps by a fixed stride, whatever the rounding of its timesteps
        t_next, end = t - grid.config.num_train_timesteps // steps, grid.final_alpha_cumprod
    else:
        t_next, end = torch.cat([t[1:], t.new_tensor([-1])]), torch.ones(())
    after = torch.where(t_next >= 0, table[t_next.clamp(min=0)], end)
    clip = grid.config.clip_sample_range if grid.config.clip_sample else None
    common = (t, table[t], after, table, grid.config.prediction_type, clip)
    if name == "ddim":
        return DDIM(*common, eta=sampling.eta)
    return DDPM(*common, variance=grid.config.variance_type)


def decode_vae(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents by a VAE's own scaling; float32 in [-1, 1] or a little beyond.

    Raises:
        ValueError: the VAE's configuration does not say how its latents are scaled.
    """
    factor, mean, std = _scaling(vae, latents)
    with _without_overflow(vae, latents.requires_grad) as vae:
        scaled = latents / factor * std + mean
        return vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()


def encode_vae(vae: Any, images: Tensor) -> Tensor:
    """The inverse: the mean of each picture's latents, float32.

    Args:
        vae: a model of diffusers.
        images: in [-1, 1].

    Raises:
        ValueError: the VAE's configuration does not say how its latents are scaled.
    """
    with _without_overflow(vae, images.requires_grad) as vae:
        found = vae.encode(images.to(vae.dtype), return_dict=False)[0]
    # a distribution, or of AutoencoderTiny the latents themselves
    latents = (found if isinstance(found, Tensor) else found.mode()).float()
    factor, mean, std = _scaling(vae, latents)
    return (latents - mean) / std * factor


def _scaling(vae: Any, latents: Tensor) -> tuple[float, Tensor | float, Tensor | float]:
    """Factor, mean and standard deviation: what is decoded is latents / factor * std + mean."""
    config = vae.config
    mean, std = (config.get(f"latents_{name}") for name in ("mean", "std"))
    if latents.ndim < 4 or ("scaling_factor" not in config and mean is None):
        raise ValueError(
            f"cannot tell how {type(vae).__name__} scales latents of shape {tuple(latents.shape)}"
        )
    factor, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    if mean is None or std is None:
        return factor, shift, 1.0
    shape = (-1, *[1] * (latents.ndim - 2))
    mean, std = (torch.tensor(v).view(shape).to(latents) for v in (mean, std))
    return factor, mean + shift, std


@contextmanager
def _without_overflow(vae: Any, gradient: bool) -> Iterator[Any]:
    """The VAE, in float32 where it says that it would overflow in float16."""
    dtype = vae.dtype
    if dtype != torch.float16 or not vae.config.get("force_upcast", False):
        yield vae
    elif gradient:  # the backward pass comes later, and needs the float32 weights then
        yield _float32_copy(vae)
    else:
        vae.to(dtype=torch.float32)
        try:
            yield vae
        finally:
            vae.to(dtype=dtype)


_float32_copies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _float32_copy(vae: Any) -> Any:
    if vae not in _float32_copies:
        _float32_copies[vae] = copy.deepcopy(vae).float().requires_grad_(False)
    return _float32_copies[vae]


def _multiples(height: int, width: int, of: int) -> tuple[int, int]:
    if height % of or width % of:
        raise ValueError(f"height and width must be multiples of {of}, but {height}x{width} came")
    return height, width


def _shift(scheduler: Any, num_tokens: int, max_shift: float) -> float:
    """The resolution-dependent timestep shift, by diffusers' own interpolation."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    return calculate_shift(
        num_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
