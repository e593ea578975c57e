"""Measure the embedded text-to-image model on the held-out prompts.

    python -m scripts.embedded.evaluate assets/emoji --seeds 4 --steps 20 --guidance 3 \\
        --figure assets/figures/emoji_samples.png --out evaluation.json

Minutes on one thread of a 2-core AMD EPYC. Prints, by category, the share of pictures that
:class:`diffreward.rewards.shapes.ShapesChecker` accepts, and its parts; draws five unselected
pictures of each of the prompts in ``SHOWN`` into the figure. Every picture has its own seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffreward.rewards.shapes import ShapesChecker
from diffreward.samples import Samples
from scripts.embedded.common import grid

BATCH, COLUMNS, ROWS = 24, 12, 5
SHOWN = """a red heart;a blue circle;a green square;a yellow star;a red circle and a blue square;
    a purple star and an orange heart;a black square and a yellow circle;
    a green heart and a green ring;three green stars;a red heart above a blue circle;
    a black ring left of a yellow triangle;two blue hearts and a red circle;
    grinning face;smiling face;slightly smiling face;smiling face with sunglasses;
    red apple;lemon;tangerine;banana;strawberry;cherries;grapes;cat face"""
SHOWN = [prompt.strip() for prompt in SHOWN.replace("\n", "").split(";")]


def generate(pipe, prompts: list[str], seeds: list[int], steps: int, guidance: float):
    """float32 (n, 3, 64, 64) in [0, 1]; picture i depends on prompt i and seed i alone."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        some = slice(start, start + BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[some]]
        pictures.append(
            pipe(
                prompts[some],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="pt",
            ).images
        )
    return torch.cat(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts/scenes.jsonl"))
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--every", type=int, default=1, help="use every n-th prompt only")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)

    pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()][:: args.every]
    prompts = [row["prompt"] for row in rows for _ in range(args.seeds)]
    categories = np.array([row["category"] for row in rows for _ in range(args.seeds)])
    start = time.time()
    pictures = generate(pipe, prompts, list(range(len(prompts))), args.steps, args.guidance)
    print(f"{(time.time() - start) / len(prompts):.2f} s per picture")
    scores = ShapesChecker()(Samples(pictures, "image", prompts=prompts))
    columns = {"exact": scores.value, **scores.parts}
    table = {}
    for category in [*dict.fromkeys(categories), "all"]:
        chosen = torch.from_numpy((categories == category) | (category == "all"))
        table[category] = {name: v[chosen].mean().item() for name, v in columns.items()}
    print("| category | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for category, values in table.items():
        print(f"| {category} | " + " | ".join(f"{v:.2f}" for v in values.values()) + " |")
    if args.out:
        settings = {"steps": args.steps, "guidance": args.guidance, "pictures": len(prompts)}
        args.out.write_text(json.dumps({**settings, "categories": table}, indent=2) + "\n")
    if args.figure:
        shown = [prompt for prompt in SHOWN for _ in range(ROWS)]
        pictures = generate(pipe, shown, list(range(len(shown))), args.steps, args.guidance)
        # a prompt is a column of ROWS pictures
        columns = (
            pictures.view(-1, COLUMNS, ROWS, *pictures.shape[1:]).transpose(1, 2).flatten(0, 2)
        )
        sheet = Image.fromarray(grid(columns * 2 - 1, COLUMNS))
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        sheet.resize((sheet.width * 5 // 4, sheet.height * 5 // 4), Image.LANCZOS).save(args.figure)


if __name__ == "__main__":
    main()
