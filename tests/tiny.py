"""Tiny random diffusers pipelines, a builder for each family; images are 16x16."""

import functools

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    MotionAdapter,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
FLOW = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0)


def seeded(build):
    """Builders give the same weights at every call, and the same object (its state is reset)."""

    @functools.cache
    def parts():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build()

    return parts


def clip_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


def clip_encoder(cls=CLIPTextModel):
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=16,
        bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return cls(config).eval()


def vae(channels=4, **config):
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    ).eval()  # fmt: skip


def unet(**config):
    config = {
        "cross_attention_dim": 16, "attention_head_dim": 2, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **config,
    }  # fmt: skip
    return UNet2DConditionModel(
        sample_size=8, norm_num_groups=4, layers_per_block=1, **config
    ).eval()


@seeded
def sd_parts():
    return {
        "vae": vae(),
        "text_encoder": clip_encoder(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "feature_extractor": None,
    }


@seeded
def sdxl_parts():
    return {
        "vae": vae(),
        "text_encoder": clip_encoder(),
        "text_encoder_2": clip_encoder(CLIPTextModelWithProjection),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": unet(
            cross_attention_dim=32, addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=40,
        ),
    }  # fmt: skip


def t5_encoder():
    config = T5Config(
        vocab_size=30, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


@seeded
def sd3_parts():
    return {
        "vae": vae(shift_factor=0.06),
        "text_encoder": clip_encoder(CLIPTextModelWithProjection),
        "text_encoder_2": clip_encoder(CLIPTextModelWithProjection),
        "text_encoder_3": t5_encoder(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": t5_tokenizer(),
        "transformer": SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32,
            pooled_projection_dim=32, out_channels=4,
        ).eval(),
    }  # fmt: skip


@seeded
def flux_parts():
    return {
        "vae": vae(shift_factor=0.06),
        "text_encoder": clip_encoder(),
        "text_encoder_2": t5_encoder(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        ).eval(),
    }  # fmt: skip


@seeded
def wan_parts():
    config = {"vocab_size": 30, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_heads": 2}
    return {
        "vae": AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval(),
        "text_encoder": UMT5EncoderModel(UMT5Config(**config, num_layers=1)).eval(),
        "tokenizer": t5_tokenizer(),
        "transformer": WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
            out_channels=16, text_dim=32, freq_dim=32, ffn_dim=16, num_layers=1,
            cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ).eval(),
    }  # fmt: skip


@seeded
def controlnet_part():
    return awake(
        ControlNetModel.from_unet(sd_parts()["unet"], conditioning_embedding_out_channels=(8, 8))
    )


@seeded
def sdxl_controlnet_part():
    return awake(
        ControlNetModel.from_unet(sdxl_parts()["unet"], conditioning_embedding_out_channels=(8, 8))
    )


SD3 = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "attention_head_dim": 8,
       "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 32,
       "pooled_projection_dim": 32, "out_channels": 4}  # fmt: skip


@seeded
def sd3_control_parts():
    """Of four layers, for two of the ControlNet, which does not reach the last."""
    return {
        "transformer": SD3Transformer2DModel(num_layers=4, **SD3).eval(),
        "controlnet": sd3_controlnet(),
    }


def sd3_controlnet(**config):
    config = {"num_layers": 2, "force_zeros_for_pooled_projection": False, **config}
    return awake(SD3ControlNetModel(**{**SD3, **config}))


FLUX = {"in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
        "num_layers": 1, "num_single_layers": 1}  # fmt: skip


@seeded
def flux_controlnet_part():
    return awake(FluxControlNetModel(patch_size=1, **FLUX))


@seeded
def flux_hint_parts():
    """A ControlNet of pixels, 8 x 8 per latent (of 2 x 2 patches), and three blocks for its two."""
    controlnet = awake(
        FluxControlNetModel(
            **{**FLUX, "num_layers": 2}, patch_size=2, conditioning_embedding_channels=4
        )
    )
    # the others blur
    torch.nn.init.normal_(controlnet.input_hint_block.conv_out.weight, std=50.0)
    transformer = FluxTransformer2DModel(**{**FLUX, "num_layers": 3}, patch_size=1).eval()
    return {"controlnet": controlnet, "transformer": transformer}


@seeded
def vae_of_8():
    return AutoencoderKL(
        block_out_channels=(4,) * 4, norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.06,
    ).eval()  # fmt: skip


@seeded
def crossed_unet_part():
    """A UNet with attention in its first block, as Stable Diffusion's, which adapters need."""
    return unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@seeded
def adapter_part():
    return T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2).eval()


@seeded
def sdxl_adapter_part():
    """For a UNet whose first block is a plain one."""
    return T2IAdapter(
        channels=[8, 16], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    ).eval()


def awake(network):
    """A ControlNet whose last layers, born zero, let something through."""
    for name, p in network.named_parameters():
        if not p.any() and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1 if "embed" not in name else 0.5)
    return network.eval()


@seeded
def motion_part():
    return MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    ).eval()  # fmt: skip


def ddpm_unet(**config):
    return UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, **config,
    ).eval()  # fmt: skip


@seeded
def ddpm_part():
    return ddpm_unet()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


SD_EXTRAS = {"safety_checker": None, "requires_safety_checker": False}


def sd(scheduler=DDIM, cls=StableDiffusionPipeline, **parts):
    return quiet(cls(**sd_parts(), **SD_EXTRAS, **parts, scheduler=fresh(scheduler)))


def img2img(scheduler=DDIM):
    return sd(scheduler, StableDiffusionImg2ImgPipeline)


def inpaint(scheduler=DDIM):
    return sd(scheduler, StableDiffusionInpaintPipeline)


def controlnet(scheduler=DDIM):
    return sd(scheduler, StableDiffusionControlNetPipeline, controlnet=controlnet_part())


def sdxl(scheduler=DDIM, cls=StableDiffusionXLPipeline, **parts):
    if cls is not StableDiffusionXLAdapterPipeline:  # which has no such option
        parts["add_watermarker"] = False
    return quiet(cls(**sdxl_parts(), **parts, scheduler=fresh(scheduler)))


def sd3(scheduler=FLOW, cls=StableDiffusion3Pipeline, **parts):
    return quiet(cls(**{**sd3_parts(), **parts}, scheduler=fresh(scheduler)))


def flux(scheduler=FLOW, cls=FluxPipeline, **parts):
    return quiet(cls(**{**flux_parts(), **parts}, scheduler=fresh(scheduler)))


def sdxl_controlnet(scheduler=DDIM):
    return sdxl(scheduler, StableDiffusionXLControlNetPipeline, controlnet=sdxl_controlnet_part())


def sd3_control(scheduler=FLOW):
    return sd3(scheduler, StableDiffusion3ControlNetPipeline, **sd3_control_parts())


def flux_control(scheduler=FLOW):
    return flux(scheduler, FluxControlNetPipeline, controlnet=flux_controlnet_part())


def flux_hint(scheduler=FLOW):
    return flux(scheduler, FluxControlNetPipeline, **flux_hint_parts(), vae=vae_of_8())


def adapter(scheduler=DDIM, cls=StableDiffusionAdapterPipeline, **parts):
    parts = {**sd_parts(), "unet": crossed_unet_part(), "adapter": adapter_part(), **parts}
    return quiet(cls(**parts, **SD_EXTRAS, scheduler=fresh(scheduler)))


def sdxl_adapter(scheduler=DDIM):
    return sdxl(scheduler, StableDiffusionXLAdapterPipeline, adapter=sdxl_adapter_part())


def animate(scheduler=DDIM):
    return quiet(
        AnimateDiffPipeline(**sd_parts(), motion_adapter=motion_part(), scheduler=fresh(scheduler))
    )


def wan(scheduler=FLOW):
    return quiet(WanPipeline(**wan_parts(), scheduler=fresh(scheduler)))


def ddpm(scheduler=None):
    return quiet(DDPMPipeline(ddpm_part(), fresh(scheduler or DDPMScheduler())))


def fresh(scheduler):
    """A new scheduler of the same configuration."""
    return type(scheduler).from_config(scheduler.config)
