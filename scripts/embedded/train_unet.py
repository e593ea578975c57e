"""Train the embedded text-to-image model: UNet and text encoder, jointly and from scratch.

    nice -n 5 python -m scripts.embedded.encode DATA      # first, or beside it
    nice -n 5 python -m scripts.embedded.train_unet DATA --minutes 88
    torchrun --nproc-per-node 2 -m scripts.embedded.train_unet DATA --minutes 88  # on two cores

On one thread of a 2-core AMD EPYC, or data-parallel on one thread each of several. v-prediction on
cached latents, 65 % scenes and 35 % emoji, 10 % empty captions for classifier-free guidance;
bfloat16 autocast, EMA. The learning rate is constant and decays over the second half of
``--minutes``, which counts earlier runs: it resumes from DATA/unet.pt, and a longer time extends
it. ``--weights assets/emoji`` goes on from the shipped weights; copy that folder's ``vae`` and
``tokenizer`` into DATA before encoding, since neither trains to the same thing twice. Every few
minutes it writes the checkpoint, a pipeline with the EMA weights (DATA/pipeline) and a grid of
samples (DATA/samples_<minute>.png).
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from diffreward.rewards.shapes import parse
from scripts.embedded.common import (
    CONTEXT,
    Clock,
    emoji_caption,
    grid,
    load,
    save,
    schedule,
    tokenizer,
    tokens,
)
from scripts.embedded.train_vae import LATENTS

BATCH, RATE, EMA = 96, 8e-4, 0.999
EMOJI_SHARE, EMPTY = 0.35, 0.1
SIMPLE = ("heart", "food-fruit", "geometric", "face-smiling")  # drawn more often
CENTRED = 0.7  # share of the emoji in their first placement, centred and upright
SINGLE = 0.5  # single objects are learnt first: drawn less often
NOISY = 0.7  # times are 1000 u^NOISY: what is drawn, and where, is decided at high noise
PROMPTS = """a red circle;a blue square;a green star;a purple heart;an orange ring;a black triangle;
    a red heart and a yellow heart;a blue circle and a green square;a red star and a black ring;
    two green circles;three red hearts;four blue squares;three yellow stars;
    a red heart above a blue circle;a green square left of an orange star;
    a yellow ring below two purple squares;
    red heart;blue heart;red circle;green circle;orange square;red apple;green apple;banana;lemon;
    grinning face;smiling face with sunglasses;neutral face;crying face;cat face;panda;pizza"""
PROMPTS = [prompt.strip() for prompt in PROMPTS.replace("\n", "").split(";")]


def build(tok) -> tuple[UNet2DConditionModel, CLIPTextModel, DDIMScheduler]:
    channels = (96, 160, 192)
    text = CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=CONTEXT,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        hidden_act="gelu",
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text.hidden_size,
        attention_head_dim=[c // 32 for c in channels],  # diffusers reads it as the number of heads
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,  # as Stable Diffusion: the last transition keeps a little noise
    )
    return unet, CLIPTextModel(text), scheduler


def pipeline(vae, text, tok, unet, scheduler) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tok,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flatten(parameters: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    """Move parameters and their gradients into one tensor each: one optimiser step, one mean."""
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in parameters]
    for p, data, grad in zip(
        parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True
    ):
        p.data, p.grad = data.view_as(p), grad.view_as(p)
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=88)
    parser.add_argument("--weights", type=Path, help="a pipeline to go on from, if no checkpoint")
    parser.add_argument("--every", type=float, default=6, help="minutes between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    batch = BATCH // world

    _, rows, _, captions = load(args.data)
    emoji = np.load(args.data / "latents_emoji.npy")
    scenes = np.load(args.data / "latents_scenes.npy", mmap_mode="r")
    counter = args.data / "latents_scenes.count"
    odds = np.array([8.0 if row["subgroup"] in SIMPLE else 1.0 for row in rows])
    odds /= odds.sum()
    single = np.array([parse(caption).count == 1 for caption in captions])
    tok = tokenizer(args.data)
    vae = AutoencoderKL.from_pretrained(args.data / "vae").eval().requires_grad_(False)
    unet, text, scheduler = build(tok)
    if args.weights:  # weights only: the optimiser starts anew
        whole = StableDiffusionPipeline.from_pretrained(args.weights, safety_checker=None)
        unet.load_state_dict(whole.unet.state_dict())
        text.load_state_dict(whole.text_encoder.state_dict())
    # On a CPU, the backward pass of PyTorch's fused attention costs more than the rest of a block.
    unet.set_attn_processor(AttnProcessor())
    text.set_attn_implementation("eager")
    size = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (unet, text)]
    print(f"UNet {size[0]:.2f}M, text encoder {size[1]:.2f}M parameters", flush=True)
    weights = flatten([*unet.parameters(), *text.parameters()])
    optimiser = torch.optim.AdamW([weights], RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    step, clock, path = 0, Clock(), args.data / "unet.pt"
    ema = weights.detach().clone()
    if path.exists():
        state = torch.load(path, weights_only=True)
        unet.load_state_dict(state["unet"])
        text.load_state_dict(state["text"])
        optimiser.load_state_dict(state["optimiser"])
        ema, step = state["ema"], state["step"]
        clock = Clock(state["minutes"], state["cpu"])
    seed = step * world + rank
    torch.manual_seed(seed)
    rng, pick = np.random.default_rng(seed), random.Random(seed)
    running, last, ready = 0.0, clock.minutes, 0

    @torch.no_grad()
    def swap() -> None:
        kept = weights.clone()
        weights.copy_(ema)
        ema.copy_(kept)

    def write() -> None:
        state = {"unet": unet.state_dict(), "text": text.state_dict(), "ema": ema, "step": step}
        state |= {"optimiser": optimiser.state_dict()}
        save(state | {"minutes": clock.minutes, "cpu": clock.cpu_minutes}, path)
        swap()
        unet.eval(), text.eval()
        pipe = pipeline(vae, text, tok, unet, scheduler)
        generator = torch.Generator().manual_seed(0)
        images = pipe(
            PROMPTS,
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=generator,
            output_type="pt",
        ).images
        name = f"samples_{clock.minutes:03.0f}.png"
        Image.fromarray(grid(images * 2 - 1, 16)).save(args.data / name)
        pipe.save_pretrained(args.data / "pipeline")
        unet.train(), text.train()
        swap()

    first, minutes = step, clock.minutes  # the same in every process
    while minutes < args.minutes:
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1 - first) / 200)
            group["lr"] *= schedule(minutes / args.minutes, 0.5)
        if step % 100 == 0 or not ready:
            ready = int(counter.read_text())
        n = int(batch * EMOJI_SHARE)
        placement = rng.integers(emoji.shape[1], size=n) * (rng.random(n) > CENTRED)
        chosen = rng.choice(len(rows), n, p=odds), placement
        some = rng.integers(ready, size=2 * batch)
        some = some[~single[some] | (rng.random(len(some)) < SINGLE)][: batch - n]
        z = torch.from_numpy(np.concatenate([emoji[chosen], scenes[some]])).float()
        prompts = [emoji_caption(rows[i], pick) for i in chosen[0]] + [captions[i] for i in some]
        prompts = ["" if pick.random() < EMPTY else prompt for prompt in prompts]
        # Stratified times, shuffled so that no data source is tied to a noise level.
        u = (torch.rand(()) + torch.randperm(batch) / batch) % 1
        t = (1000 * u**NOISY).long().clamp(max=999)
        noise = torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = text(tokens(tok, prompts))[0]
            v = unet(scheduler.add_noise(z, noise, t), t, encoder_hidden_states=hidden).sample
        loss = F.mse_loss(v.float(), scheduler.get_velocity(z, noise, t))
        weights.grad.zero_()
        loss.backward()
        minutes = clock.minutes
        if world > 1:
            dist.all_reduce(weights.grad)
            weights.grad /= world
            now = torch.tensor(minutes, dtype=torch.float64)
            dist.broadcast(now, 0)
            minutes = now.item()
        torch.nn.utils.clip_grad_norm_([weights], 1.0)
        optimiser.step()
        step += 1
        decay = min(EMA, (1 + step) / (20 + step))
        ema.lerp_(weights.detach(), 1 - decay)
        running = loss.item() if running == 0 else 0.99 * running + 0.01 * loss.item()
        if rank > 0:
            continue
        if step % 100 == 0:
            print(
                f"step {step} {clock.minutes:.1f} min ({clock.cpu_minutes:.1f} CPU) "
                f"loss {running:.4f}, {ready} scenes",
                flush=True,
            )
        if clock.minutes - last > args.every:
            last = clock.minutes
            write()
    if rank > 0:
        return
    write()
    print(f"final: {step} steps of {BATCH}, {clock.minutes:.1f} min ({clock.cpu_minutes:.1f} CPU)")


if __name__ == "__main__":
    main()
