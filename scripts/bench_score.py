"""What batch scoring costs beyond the network itself, as ratios within one run.

    python scripts/bench_score.py                       # ViT-B/32, random weights, CPU
    python scripts/bench_score.py --tiny                # seconds: to see that it runs
    python scripts/bench_score.py --device cuda --images 4096

A CLIP of ViT-B/32 size is built from its config with random weights (they take as long as trained
ones), saved and loaded as a user's checkpoint is. The same JPEG files are then scored, in turn:

- ``forward``: the network alone, on preprocessed batches in memory: what cannot be avoided;
- ``score``: `diffreward.score`, from files to a Parquet file;
- ``loop``: one image at a time, opened, transformed by open_clip in PIL, and its prompt encoded
  each time, as the published packages do;
- ``two``: `score` by CLIP and by an aesthetic head on the same tower;
- ``torchmetrics``, if it is installed: its CLIPScore in batches, of the same network and
  transform, which it is given as model and processor: with the features of transformers 5, which
  are no tensors, it fails (torchmetrics 1.9). It has one number for all images, none for each.

Goals: score at least 0.9 of forward, at least 3 times loop; two under 1.1 times the cost of one.
Results belong in docs/benchmarks.md, with hardware and date.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffreward import make_reward
from diffreward.rewards import RewardInfo, Scores
from diffreward.rewards.towers import load_tower
from diffreward.scoring import score

PROMPTS = ["a red heart", "a blue circle above a green star", "two yellow squares"]


def make_model(folder: Path, tiny: bool) -> str:
    """A CLIP with random weights in open_clip's layout."""
    import open_clip
    from safetensors.torch import save_file

    config = open_clip.get_model_config("ViT-B-32")
    if tiny:
        config["embed_dim"] = 32
        config["vision_cfg"].update(layers=2, width=64, image_size=64, patch_size=16)
        config["text_cfg"].update(layers=2, width=64, heads=2)
    torch.manual_seed(0)
    network = open_clip.CLIP(**config)
    folder.mkdir()
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    about = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return f"local-dir:{folder}"


def make_images(folder: Path, count: int, size: int) -> list[str]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = []
    for n in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = folder / f"{n:06d}.jpg"
        small.resize((size, size), Image.Resampling.BICUBIC).save(file, quality=92)
        files.append(str(file))
    return files


class Head:
    """An aesthetic predictor's five linear layers on a tower's features, random weights."""

    def __init__(self, model: str):
        self.info = RewardInfo("aesthetic_head", modality="image")
        self.tower = load_tower(model)
        self.preprocess = self.tower.preprocess
        widths = [self.tower.text_features(["x"]).shape[1], 1024, 128, 64, 16, 1]
        layers = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
        self.mlp = torch.nn.Sequential(*layers).requires_grad_(False)

    def __call__(self, samples):
        return self.score_prepared(self.preprocess(samples.data), samples.prompts)

    def score_prepared(self, prepared, prompts=None):
        features = torch.nn.functional.normalize(self.tower.encode(prepared), dim=-1)
        return Scores(self.mlp.to(prepared.device)(features).squeeze(-1))


class Bench:
    """The model, the files, and a method for each way of scoring them."""

    def __init__(self, args, folder: Path):
        self.args, self.folder, self.runs = args, folder, 0
        self.model = make_model(folder / "model", args.tiny)
        self.files = make_images(folder / "images", args.images, args.size)
        self.prompts = [PROMPTS[n % len(PROMPTS)] for n in range(args.images)]
        self.clip = make_reward("clip_score", model=self.model)
        self.head = Head(self.model)
        size = self.clip.preprocess.size
        self.batches = [
            torch.randn(min(args.batch_size, args.images - start), 3, *size)
            for start in range(0, args.images, args.batch_size)
        ]

    def forward(self):
        self.clip.tower.to(self.args.device)
        with torch.no_grad():
            for batch in self.batches:
                self.clip.tower.encode(batch.to(self.args.device)).cpu()

    def scored(self, rewards):
        self.runs += 1
        score(
            self.files, rewards, prompts=self.prompts, out=self.folder / f"{self.runs}.parquet",
            batch_size=self.args.batch_size, num_workers=self.args.num_workers,
            device=self.args.device,
        )  # fmt: skip

    def score(self):
        self.scored(self.clip)

    def two(self):
        self.scored([self.clip, self.head])

    def loop(self):
        import open_clip

        network = self.clip.tower.network
        transform = open_clip.image_transform(network.visual.image_size, is_train=False)
        tokenizer = open_clip.get_tokenizer(self.model)
        with torch.no_grad():
            for file, prompt in zip(self.files, self.prompts, strict=True):
                with Image.open(file) as image:
                    pixels = transform(image.convert("RGB"))[None].to(self.args.device)
                image = network.encode_image(pixels, normalize=True)
                text = network.encode_text(tokenizer([prompt]).to(self.args.device), normalize=True)
                (image * text).sum().item()

    def torchmetrics(self):
        from torchmetrics.multimodal import CLIPScore

        network = _ForTorchmetrics(self.clip.tower.network)
        metric = CLIPScore(lambda: (network, _Processor(network.clip, self.model)))
        with torch.no_grad():
            for start in range(0, len(self.files), self.args.batch_size):
                images = []
                for file in self.files[start : start + self.args.batch_size]:
                    with Image.open(file) as image:
                        pixels = np.array(image.convert("RGB"))
                    images.append(torch.from_numpy(pixels).permute(2, 0, 1).to(self.args.device))
                metric.update(images, self.prompts[start : start + self.args.batch_size])
        return metric.compute().item()


class _ForTorchmetrics(torch.nn.Module):
    """An open_clip network by the names that CLIPScore calls."""

    config = None

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def get_image_features(self, pixels):
        return self.clip.encode_image(pixels)

    def get_text_features(self, tokens, mask):
        return self.clip.encode_text(tokens)


class _Processor:
    """open_clip's transform and tokenizer, called as a processor of transformers is."""

    def __init__(self, network, model):
        import open_clip

        self.transform = open_clip.image_transform(network.visual.image_size, is_train=False)
        self.tokenizer = open_clip.get_tokenizer(model)

    def __call__(self, images=None, text=None, **_):
        if text is not None:
            tokens = self.tokenizer(text)
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return {"pixel_values": torch.stack([self.transform(image) for image in pictures])}


def clock(work, device) -> float:
    started = time.perf_counter()
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small network and 40 images")
    parser.add_argument("--images", type=int)
    parser.add_argument("--size", type=int, default=512, help="of the JPEG files, in pixels")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, help="of score; default: its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.images = args.images or (40 if args.tiny else 256)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        arms = {"forward": bench.forward, "score": bench.score, "two": bench.two,
                "loop": bench.loop}  # fmt: skip
        if importlib.util.find_spec("torchmetrics"):
            arms["torchmetrics"] = bench.torchmetrics
        for work in arms.values():  # warm-up; from here on, prompts are known to `score`
            work()
        seconds = {name: [] for name in arms}
        for _ in range(args.repeats):  # alternating: a busy machine is busy for all of them
            for name, work in arms.items():
                seconds[name].append(clock(work, args.device))

    def ratio(over: str, under: str) -> dict[str, float]:
        ratios = sorted(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
        found = {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]}
        return {name: round(number, 3) for name, number in found.items()}

    compared = {
        "rate of score / rate of forward (goal: >= 0.9)": ("forward", "score"),
        "rate of score / rate of loop (goal: >= 3)": ("loop", "score"),
        "cost of two / cost of one (goal: < 1.1)": ("two", "score"),
        "rate of score / rate of torchmetrics": ("torchmetrics", "score"),
    }
    print(
        json.dumps(
            {
                "images": args.images,
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "images_per_second": {
                    name: round(args.images / statistics.median(times), 2)
                    for name, times in seconds.items()
                },
                **{about: ratio(*two) for about, two in compared.items() if two[0] in seconds},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
