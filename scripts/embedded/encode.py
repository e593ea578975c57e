"""Cache the latents on which the embedded diffusion model trains.

    nice -n 5 python -m scripts.embedded.encode DATA [--limit 24576]

About ten minutes on one thread of a 2-core AMD EPYC for 80,000 scenes. Writes
DATA/latents_emoji.npy and DATA/latents_scenes.npy (float16, posterior means); the scenes are
written in chunks and DATA/latents_scenes.count says how many are ready, so that training can begin
early. A second call goes on where the first one ended.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from scripts.embedded.common import load, pixels

CHUNK = 2048


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """uint8 (n, 64, 64, 3) -> float16 latents (n, 16, 8, 8)."""
    parts = []
    for start in range(0, len(images), 64):
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels(images[start : start + 64])).latent_dist
        parts.append(posterior.mode().to(torch.float16))
    return torch.cat(parts).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, help="encode so many scenes; default all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    emoji, _, scenes, _ = load(args.data)
    vae = AutoencoderKL.from_pretrained(args.data / "vae").eval()
    target, counter = args.data / "latents_scenes.npy", args.data / "latents_scenes.count"
    shape = encode(vae, scenes[:1]).shape[1:]
    if counter.exists():
        cache, done = np.load(target, mmap_mode="r+"), int(counter.read_text())
    else:
        flat = encode(vae, emoji.reshape(-1, *emoji.shape[2:]))
        np.save(args.data / "latents_emoji.npy", flat.reshape(*emoji.shape[:2], *shape))
        cache = np.lib.format.open_memmap(target, "w+", np.float16, (len(scenes), *shape))
        done = 0
    for start in range(done, min(args.limit or len(scenes), len(scenes)), CHUNK):
        cache[start : start + CHUNK] = encode(vae, scenes[start : start + CHUNK])
        cache.flush()
        counter.write_text(str(min(start + CHUNK, len(scenes))))
        print(counter.read_text(), "scenes", flush=True)


if __name__ == "__main__":
    main()
