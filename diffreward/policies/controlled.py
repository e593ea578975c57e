"""Image policies that a control image conditions: ControlNets and T2I-Adapters.

A second network, the *controller*, reads the control image, and what it returns is added to the
activations of the base network, the one that predicts. Both calls are those of diffusers' pipelines
at their defaults: at every step, with the same control in both halves of guidance.

The control image is kept as it came, as pixels in [0, 1], in ``condition.tensors["control"]`` and
in the ``context["control"]`` of decoded samples, where rewards read it. Controllers of Stable
Diffusion 3 and FLUX take its latents, which are encoded once, as the VAE's mean; diffusers draws
from the VAE's distribution.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffreward.policies.pipelines import (
    FluxPolicy,
    PipelinePolicy,
    StableDiffusion3Policy,
    StableDiffusionPolicy,
    StableDiffusionXLPolicy,
    encode_vae,
)
from diffreward.policy import Condition
from diffreward.samples import Samples

TRAINED = ("control", "base")
_OUTPUTS = re.compile(r"controlnet_(\w+_)?blocks?\.")  # a ControlNet's last layers, born zero


class ControlledPolicy(PipelinePolicy, ABC):
    """A `PipelinePolicy` with a controller; subclasses say how it is called.

    Args:
        pipe: the pipeline, unchanged.
        controller: the ControlNet or adapter; None: the pipeline's own.
        control_scale: what the controller returns is multiplied by it.
        train: which network is ``denoiser``, the one that is trained: "control" or "base".
        args, options: of `PipelinePolicy`.

    Raises:
        ValueError: a controller of another class, or one that does not fit the base network.
    """

    kind: ClassVar[str]  #: the option that loads it, and what pipelines call it
    controller_class: ClassVar[str]  #: of diffusers
    shared = ("control",)

    def __init__(
        self, pipe, *args, controller: nn.Module | None = None, control_scale: float = 1.0,
        train: str = "control", **options,
    ) -> None:  # fmt: skip
        self.trained = "base"  # while the base network is looked at
        super().__init__(pipe, *args, **options)
        self._controller = getattr(pipe, self.kind) if controller is None else controller
        self.control_scale, self.trained = control_scale, train
        if (found := type(self._controller).__name__) != self.controller_class:
            raise ValueError(
                f"{self.kind} of {type(pipe).__name__} is one {self.controller_class}, but "
                f"{found} came"
            )
        self._check_fit()
        if train == "control":
            self.denoiser = self._controller

    @property
    def base(self) -> nn.Module:
        return self.denoiser if self.trained == "base" else getattr(self.pipe, self.network)

    @property
    def controller(self) -> nn.Module:
        """The ControlNet or adapter."""
        return self.denoiser if self.trained == "control" else self._controller

    @property
    @abstractmethod
    def control_channels(self) -> int:
        """How many a control image has."""

    @staticmethod
    @abstractmethod
    def fresh(base: nn.Module, pipe: Any) -> nn.Module:
        """A new controller that fits a base network, to be trained."""

    def encode(self, prompts: Sequence[str], *, control: Any = None, **inputs) -> Condition:
        """Prompts and their control images.

        Args:
            prompts: b prompts.
            control: float ``(b, c, h, w)`` in [0, 1], of the model's height and width; c is
                `control_channels`, or 1, which is repeated.
            inputs: there are no others.

        Raises:
            ValueError: no control images, or others than these.
        """
        if inputs:
            raise ValueError(
                f"{type(self.pipe).__name__} takes prompts and control, but {', '.join(inputs)} "
                "came"
            )
        prompts = self._listed(prompts)
        control = self._checked(control, len(prompts))
        condition = super().encode(prompts)
        control = control.detach().to(self.device, torch.float32)
        condition.tensors |= {"control": control, **self._embed_control(control)}
        return condition

    def _checked(self, control: Any, count: int) -> Tensor:
        c, size = self.control_channels, (self.height, self.width)
        wanted = f"float images ({count}, {c}, {size[0]}, {size[1]}) in [0, 1]"
        if control is None:
            raise ValueError(
                f"this model is conditioned on a control image for each prompt, and none came; "
                f"encode(prompts, control=...) takes {wanted} (steer: inputs={{'control': ...}}; "
                "finetune, and the command line: data)"
            )
        if not isinstance(control, Tensor) or control.ndim != 4:
            came = tuple(control.shape) if isinstance(control, Tensor) else type(control).__name__
            raise ValueError(f"control takes {wanted}, but {came} came")
        if not control.is_floating_point():
            raise ValueError(
                f"control takes {wanted}, but {control.dtype} came; divide uint8 images by 255"
            )
        if len(control) != count:
            raise ValueError(
                f"{len(control)} control images came for {count} prompts; give one for each"
            )
        if control.shape[1] not in (1, c):
            raise ValueError(
                f"control images of this model have {c} channels (or 1), but "
                f"{control.shape[1]} came"
            )
        if tuple(control.shape[2:]) != size:
            h, w = control.shape[2:]
            raise ValueError(
                f"control images of this model are {size[0]}x{size[1]}, but {h}x{w} came; resize "
                "them, or load the model with this height and width"
            )
        low, high = control.min().item(), control.max().item()
        if not (low >= 0 and high <= 1):  # NaN, too
            raise ValueError(
                f"control images lie in [0, 1], but values from {low:.4g} to {high:.4g} came"
            )
        return control.expand(-1, c, -1, -1)

    def _embed_control(self, control: Tensor) -> dict[str, Tensor]:
        return {}

    def decode(self, x0: Tensor, condition: Condition) -> Samples:
        samples = super().decode(x0, condition)
        samples.context["control"] = condition.tensors["control"]
        return samples

    def check_adapters(self, layers: Sequence[str]) -> None:
        """Refuse a LoRA that nothing would ever reach.

        Args:
            layers: names of those of ``denoiser`` that are to get adapters.

        Raises:
            ValueError: the ControlNet's last layers are zero, and none of them is trained.
        """
        if self.trained == "base" or any(_OUTPUTS.match(f"{name}.") for name in layers):
            return
        last = [p for n, p in self.denoiser.named_parameters() if _OUTPUTS.match(n)]
        if last and not any(bool(p.any()) for p in last):
            raise ValueError(
                f"this {self.controller_class} is new: its last layers are zero, so that adapters "
                "before them would learn nothing; train it in full first (method: full), or name "
                "layers of controlnet_..._blocks in lora.targets, too"
            )

    @abstractmethod
    def _check_fit(self) -> None:
        """Refuse a controller that does not fit the base network.

        Raises:
            ValueError: naming the first thing that differs.
        """

    def _misfit(self, why: str) -> ValueError:
        return ValueError(
            f"this {self.controller_class} does not fit the {type(self.base).__name__}: {why}; "
            f"take one that was made for this model, or {self.kind}='new'"
        )

    def _compare(self, values: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (own, wanted) in values.items():
            own, wanted = (tuple(v) if isinstance(v, list) else v for v in (own, wanted))
            if own != wanted:
                raise self._misfit(f"its {name} is {own}, but {wanted} is needed")

    def _compare_depth(self, *names: str) -> None:
        """Blocks of a transformer's controller: at most as many as there are to add them to."""
        own, base = self._controller.config, self.base.config
        for name in names:
            if own[name] > base[name]:
                raise self._misfit(f"its {name} is {own[name]}, but there are only {base[name]}")


class _UNetControlNet(ControlledPolicy):
    """A ControlNet beside a UNet."""

    kind, controller_class = "controlnet", "ControlNetModel"

    @property
    def control_channels(self) -> int:
        return self._controller.config.conditioning_channels

    @staticmethod
    def fresh(base, pipe):
        from diffusers import ControlNetModel

        halvings = int(math.log2(pipe.vae_scale_factor))
        channels = (16, 32, 96, 256, *[256] * halvings)[: halvings + 1]
        return ControlNetModel.from_unet(base, conditioning_embedding_out_channels=channels)

    def _check_fit(self) -> None:
        own, base = self._controller.config, self.base.config
        names = ["in_channels", "block_out_channels", "layers_per_block"]
        if "CrossAttn" in f"{own.down_block_types}{own.mid_block_type}":
            names.append("cross_attention_dim")
        if own.addition_embed_type is not None:
            names += ["addition_embed_type", "projection_class_embeddings_input_dim"]
        self._compare({name: (own[name], base[name]) for name in names})
        scale = 2 ** (len(own.conditioning_embedding_out_channels) - 1)
        if scale != self._scale():
            raise self._misfit(
                f"it takes control images {scale} times as large as the latents, and pictures are "
                f"{self._scale()} times as large"
            )
        if own.global_pool_conditions:
            raise self._misfit(
                "it pools its outputs (global_pool_conditions), which is not supported"
            )

    def _network(self, c, x, t, *, encoder_hidden_states, timestep_cond, **more):
        down, mid = self.controller(
            *_like(self.controller, (x,)),
            t,
            **_like(self.controller, {"encoder_hidden_states": encoder_hidden_states, **more}),
            controlnet_cond=_like(self.controller, c["control"]),
            conditioning_scale=self.control_scale,
            return_dict=False,
        )
        inputs = {"encoder_hidden_states": encoder_hidden_states, "timestep_cond": timestep_cond}
        residuals = {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
        }
        x, inputs = _like(self.base, (x, {**inputs, **more, **residuals}))
        return self.base(x, t, **inputs).sample


class StableDiffusionControlNetPolicy(_UNetControlNet, StableDiffusionPolicy):
    """A ControlNet beside Stable Diffusion 1.x or 2.x."""


class StableDiffusionXLControlNetPolicy(_UNetControlNet, StableDiffusionXLPolicy):
    """A ControlNet beside Stable Diffusion XL."""


class _Adapter(ControlledPolicy):
    """A T2I-Adapter beside a UNet. It is called at every step, so that it can be trained."""

    kind, controller_class = "adapter", "T2IAdapter"

    def __init__(self, pipe, *args, **options) -> None:
        super().__init__(pipe, *args, **options)
        if self.trained == "control":  # it has no attention
            self.lora_targets = ("conv_in", "in_conv", "block1", "block2")

    @property
    def control_channels(self) -> int:
        return self._controller.config.in_channels

    @staticmethod
    def fresh(base, pipe):
        from diffusers import T2IAdapter

        channels, scale = list(base.config.block_out_channels), pipe.vae_scale_factor
        if getattr(base.down_blocks[0], "has_cross_attention", False) or len(channels) != 3:
            return T2IAdapter(channels=channels, downscale_factor=scale)
        return T2IAdapter(
            channels=[*channels, channels[-1]], downscale_factor=2 * scale,
            adapter_type="full_adapter_xl",
        )  # fmt: skip

    def _check_fit(self) -> None:
        """Compare the shapes of its feature maps with those they are added to; nothing is computed.

        Raises:
            ValueError: naming the first that differs.
        """
        adapter, size = self._controller, (self.height, self.width)
        weights = {n: torch.empty_like(p, device="meta") for n, p in adapter.named_parameters()}
        image = torch.empty(1, self.control_channels, *size, device="meta")
        try:
            features = torch.func.functional_call(adapter, weights, (image,))
        except RuntimeError as err:
            raise self._misfit(f"it cannot read images of {size[0]}x{size[1]} ({err})") from err
        places = self._places()
        if len(features) > len(places):
            raise self._misfit(
                f"it has {len(features)} feature maps, and there are {len(places)} places for them"
            )
        for feature, (place, shape) in zip(features, places, strict=False):
            if tuple(feature.shape[1:]) != shape:
                own = "x".join(map(str, feature.shape[1:]))
                raise self._misfit(
                    f"a feature map of {own} came for {place}, which takes "
                    f"{'x'.join(map(str, shape))}"
                )

    def _places(self) -> list[tuple[str, tuple[int, int, int]]]:
        """Where feature maps are added, and their shapes there."""
        scale, places = self._scale(), []
        h, w = self.height // scale, self.width // scale
        for i, block in enumerate(self.base.down_blocks):
            c, name = self.base.config.block_out_channels[i], f"down block {i}"
            if crossed := getattr(block, "has_cross_attention", False):
                places.append((name, (c, h, w)))
            if block.downsamplers is not None:
                h, w = math.ceil(h / 2), math.ceil(w / 2)
                name += " (a plain one: added after downsampling)"
            if not crossed:
                places.append((name, (c, h, w)))
        return [*places, ("the middle block", (c, h, w))]

    def _network(self, c, x, t, **inputs):
        features = self.controller(_like(self.controller, c["control"]))
        features = [feature * self.control_scale for feature in features]
        x, inputs = _like(
            self.base, (x, {**inputs, "down_intrablock_additional_residuals": features})
        )
        return self.base(x, t, **inputs).sample


class StableDiffusionAdapterPolicy(_Adapter, StableDiffusionPolicy):
    """A T2I-Adapter beside Stable Diffusion 1.x or 2.x."""


class StableDiffusionXLAdapterPolicy(_Adapter, StableDiffusionXLPolicy):
    """A T2I-Adapter beside Stable Diffusion XL."""


class StableDiffusion3ControlNetPolicy(ControlledPolicy, StableDiffusion3Policy):
    """A ControlNet beside Stable Diffusion 3 or 3.5."""

    kind, controller_class = "controlnet", "SD3ControlNetModel"
    shared = ("control_latents",)

    @property
    def control_channels(self) -> int:
        return self.pipe.vae.config.in_channels

    @staticmethod
    def fresh(base, pipe):
        from diffusers import SD3ControlNetModel

        # the last block has no text stream to go on with
        layers = min(12, base.config.num_layers - 1)
        if layers < 1:
            raise ValueError("a new ControlNet is made of all blocks but the last: there is one")
        more = {"use_pos_embed": True, "force_zeros_for_pooled_projection": False}
        stand_in = _stand_in(base, **more)  # diffusers would write into the configuration
        return SD3ControlNetModel.from_transformer(stand_in, layers, 0)

    def _check_fit(self) -> None:
        own, base = self._controller.config, self.base.config
        names = ["in_channels", "patch_size", "pooled_projection_dim"]
        if own.joint_attention_dim is not None:
            names.append("joint_attention_dim")
        self._compare({name: (own[name], base[name]) for name in names})
        extra = own.extra_conditioning_channels  # of masks, for inpainting
        self._compare(
            {"width": (_width(own), _width(base)), "extra_conditioning_channels": (extra, 0)}
        )
        self._compare_depth("num_layers")
        if not own.use_pos_embed and self._controller.pos_embed is None:  # shares the base's
            pos_embed = self._controller._get_pos_embed_from_transformer(self.base)
            p = next(self._controller.parameters())
            self._controller.pos_embed = pos_embed.to(p.device, p.dtype)

    def _embed_control(self, control):
        vae, latents = self.pipe.vae, encode_vae(self.pipe.vae, control * 2 - 1)
        if self._controller.config.force_zeros_for_pooled_projection:  # these leave out the shift
            latents = latents + (vae.config.shift_factor or 0.0) * vae.config.scaling_factor
        return {"control_latents": latents.detach()}

    def _network(self, c, *, hidden_states, timestep, encoder_hidden_states, pooled_projections):
        config, x, pooled = self.controller.config, hidden_states, pooled_projections
        if config.force_zeros_for_pooled_projection:
            pooled = torch.zeros_like(pooled)
        inputs = {
            "hidden_states": x,
            "controlnet_cond": c["control_latents"],
            "encoder_hidden_states": (
                None if config.joint_attention_dim is None else encoder_hidden_states
            ),
            "pooled_projections": pooled,
        }
        residuals = self.controller(
            **_like(self.controller, inputs),
            timestep=timestep,
            conditioning_scale=self.control_scale,
            return_dict=False,
        )[0]
        inputs = {
            "hidden_states": x,
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "block_controlnet_hidden_states": residuals,
        }
        return self.base(**_like(self.base, inputs), timestep=timestep).sample


class FluxControlNetPolicy(ControlledPolicy, FluxPolicy):
    """A ControlNet beside FLUX.1: of latents, or of pixels (with an ``input_hint_block``)."""

    kind, controller_class = "controlnet", "FluxControlNetModel"

    @property
    def control_channels(self) -> int:
        return self.pipe.vae.config.in_channels

    @staticmethod
    def fresh(base, pipe):
        from diffusers import FluxControlNetModel

        config = base.config
        return FluxControlNetModel.from_transformer(
            _stand_in(base),
            num_layers=min(4, config.num_layers),
            num_single_layers=min(10, config.num_single_layers),
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
        )

    @property
    def _of_pixels(self) -> bool:
        return self._controller.config.conditioning_embedding_channels is not None

    def _check_fit(self) -> None:
        own, base = self._controller.config, self.base.config
        names = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
        self._compare({name: (own[name], base[name]) for name in names})
        # a union of several kinds of control images would have to be told which one came
        self._compare({"width": (_width(own), _width(base)), "num_mode": (own.num_mode, None)})
        self._compare_depth("num_layers", "num_single_layers")
        if self._of_pixels and 8 * own.patch_size != 2 * self._scale():
            raise self._misfit(
                f"it reads patches of {8 * own.patch_size} pixels, and one of latents has "
                f"{2 * self._scale()}"
            )

    def _embed_control(self, control):
        if self._of_pixels:
            return {}
        latents = encode_vae(self.pipe.vae, control * 2 - 1)
        return {"control_latents": self.pipe._pack_latents(latents, *latents.shape).detach()}

    def _network(self, c, *, timestep, guidance, txt_ids, img_ids, **inputs):
        control = c["control"] * 2 - 1 if self._of_pixels else c["control_latents"]
        where = {"timestep": timestep, "txt_ids": txt_ids, "img_ids": img_ids}
        blocks, single = self.controller(
            **_like(self.controller, {**inputs, "controlnet_cond": control}),
            **where,
            guidance=self._guidance_input(self.controller, inputs["hidden_states"]),
            conditioning_scale=self.control_scale,
            return_dict=False,
        )
        residuals = {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single}
        return self.base(
            **_like(self.base, {**inputs, **residuals}),
            **where,
            guidance=guidance,
            controlnet_blocks_repeat=self._of_pixels,
        ).sample


CONTROLLED: dict[str, type[ControlledPolicy]] = {
    "StableDiffusionControlNetPipeline": StableDiffusionControlNetPolicy,
    "StableDiffusionXLControlNetPipeline": StableDiffusionXLControlNetPolicy,
    "StableDiffusion3ControlNetPipeline": StableDiffusion3ControlNetPolicy,
    "FluxControlNetPipeline": FluxControlNetPolicy,
    "StableDiffusionAdapterPipeline": StableDiffusionAdapterPolicy,
    "StableDiffusionXLAdapterPipeline": StableDiffusionXLAdapterPolicy,
}
"""Class name of a diffusers pipeline with a controller -> its policy."""


def with_controller(pipeline: str, kind: str) -> type[ControlledPolicy]:
    """The policy of a pipeline without a controller, given one.

    Args:
        pipeline: name of its class.
        kind: "controlnet" or "adapter".

    Raises:
        ValueError: it takes none.
    """
    suffix = {"controlnet": "ControlNetPipeline", "adapter": "AdapterPipeline"}[kind]
    fitting = {n.removesuffix(suffix) + "Pipeline": c for n, c in CONTROLLED.items()
               if n.endswith(suffix)}  # fmt: skip
    if pipeline in CONTROLLED:
        raise ValueError(
            f"{kind} came for a {pipeline}, which has its own {CONTROLLED[pipeline].kind}; leave "
            "one of the two out"
        )
    if pipeline not in fitting:
        raise ValueError(
            f"there is no {kind} for {pipeline}; models that take one are {', '.join(fitting)}"
        )
    return fitting[pipeline]


def new_controller(policy: type[ControlledPolicy], pipe: Any) -> nn.Module:
    """A controller to be trained; what of it is random is the same each time.

    A ControlNet has the base network's weights, and changes nothing at first; an adapter is random.

    Raises:
        ValueError: there is none for this base network.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return policy.fresh(getattr(pipe, policy.network), pipe).eval()


def _stand_in(network: nn.Module, **config) -> SimpleNamespace:
    """What ``from_transformer`` reads of a network, with a configuration of its own."""
    return SimpleNamespace(config={**network.config, **config}, **dict(network.named_children()))


def _width(config: Any) -> int:
    return config.num_attention_heads * config.attention_head_dim


def _like(network: nn.Module, value: Any) -> Any:
    """Floating-point tensors, however nested, in a network's dtype."""
    if isinstance(value, Tensor):
        dtype = next(p.dtype for p in network.parameters() if p.is_floating_point())
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _like(network, v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_like(network, v) for v in value)
    return value
