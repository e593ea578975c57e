"""Train the embedded model's autoencoder: 64x64 pictures to 16 channels of 8x8, and back.

    nice -n 5 python -m scripts.embedded.train_vae DATA --minutes 25

One thread of a 2-core AMD EPYC. An ``AutoencoderKL`` with L1, MSE, gradient and coarse L1 losses
and a small KL weight, on emoji (in all placements) and rendered scenes, half and half. At the end,
per-channel whitening of the latents is baked into ``quant_conv`` / ``post_quant_conv``: latents
have mean 0 and deviation 1 and ``scaling_factor`` is 1. Resumes from DATA/vae.pt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from diffreward.rewards.shapes import random_scene, render
from scripts.embedded.common import (
    Clock,
    bucket,
    emoji_key,
    grid,
    load,
    pixels,
    psnr,
    save,
    schedule,
)

LATENTS = 16
BATCH, RATE, KL = 8, 1.2e-3, 2e-6


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 128),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def unseen(row: dict) -> bool:
    """One emoji in sixteen is kept from the autoencoder, for the held-out PSNR."""
    return bucket(emoji_key(row), 16) == 0


def held_out_scenes(count: int, seed: int = 7) -> torch.Tensor:
    rng, pictures = np.random.default_rng(seed), []
    while len(pictures) < count:
        scene = random_scene(rng)
        if scene.held_out():
            pictures.append(render(scene, rng))
    return pixels(np.stack(pictures))


def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)


def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    error = y - x
    loss = error.abs().mean() + error.square().mean()
    loss = loss + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    for factor in (4, 8):  # colours and places of whole parts
        loss = loss + 0.5 * F.avg_pool2d(error, factor).abs().mean()
    return loss


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Bake the latents' per-channel mean m and deviation s into the convolutions around them."""
    z = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(128)])
    m, s = z.mean((0, 2, 3)), z.std((0, 2, 3))
    print("latent deviations before whitening", [round(v, 2) for v in s.tolist()])
    weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias  # decodes z * s + m
    bias += (weight[:, :, 0, 0] * m).sum(1)
    weight *= s[None, :, None, None]
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias  # means, then log-variances
    weight[:LATENTS] /= s[:, None, None, None]
    bias[:LATENTS] = (bias[:LATENTS] - m) / s
    bias[LATENTS:] -= 2 * s.log()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    emoji, rows, scenes, _ = load(args.data)
    seen = [i for i, row in enumerate(rows) if not unseen(row)]
    hidden = [i for i, row in enumerate(rows) if unseen(row)]
    test = {"emoji": pixels(emoji[hidden, 0]), "scenes": held_out_scenes(128)}
    rng = np.random.default_rng(0)

    vae = build()
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters, {len(seen)} emoji")
    optimiser = torch.optim.AdamW(vae.parameters(), RATE, betas=(0.9, 0.95), weight_decay=1e-3)
    step, clock, path = 0, Clock(), args.data / "vae.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        step, clock = state["step"], Clock(state["minutes"], state["cpu"])
        rng = np.random.default_rng(step)

    def report() -> str:
        vae.eval()
        values = {k: psnr(x, reconstruct(vae, x)).mean().item() for k, x in test.items()}
        vae.train()
        return ", ".join(f"{k} {v:.2f} dB" for k, v in values.items())

    while clock.minutes < args.minutes:
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50)
            group["lr"] *= schedule(clock.minutes / args.minutes, 0.3)
        chosen = rng.choice(seen, BATCH // 2), rng.integers(emoji.shape[1], size=BATCH // 2)
        some = np.sort(rng.integers(len(scenes), size=BATCH - BATCH // 2))
        x = pixels(np.concatenate([emoji[chosen], scenes[some]]))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        loss = loss_of(x, y.float()) + KL * posterior.kl().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 250 == 0:
            print(
                f"step {step} {clock.minutes:.1f} min ({clock.cpu_minutes:.1f} CPU) "
                f"loss {loss.item():.4f} kl {posterior.kl().mean().item():.0f}; {report()}",
                flush=True,
            )
            state = {"vae": vae.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            save(state | {"minutes": clock.minutes, "cpu": clock.cpu_minutes}, path)

    vae.eval()
    whiten(vae, pixels(np.concatenate([emoji[seen, 0], scenes[:768]])))
    print(f"final: {step} steps, {clock.minutes:.1f} min ({clock.cpu_minutes:.1f} CPU); {report()}")
    vae.save_pretrained(args.data / "vae")
    pairs = [torch.cat([x[:16], reconstruct(vae, x[:16])]) for x in test.values()]
    Image.fromarray(grid(torch.cat(pairs), 16)).save(args.data / "vae_held_out.png")


if __name__ == "__main__":
    main()
