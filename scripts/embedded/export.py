"""Copy what was trained into assets/: the pipeline and the two CLIPs.

    python -m scripts.embedded.export DATA assets

Seconds. ``assets/emoji`` is what ``StableDiffusionPipeline.from_pretrained`` reads: UNet in float16
in shards below 14 MB, autoencoder and text encoder in float32. The CLIPs are stored in float16 too;
both libraries load float16 weights into float32 modules. Each folder is written beside its place
and then renamed; a README.md that is there already stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

WEIGHTS = "open_clip_model.safetensors"


def replace(new: Path, place: Path) -> None:
    """Put the folder ``new`` at ``place``, keeping the README.md of the old one."""
    for file in new.rglob("*.safetensors"):
        file.chmod(0o644)
    card = place / "README.md"
    if card.exists():
        shutil.copy(card, new)
    old = place.with_name(place.name + ".old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def export_pipeline(source: Path, place: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(source)
    pipe.unet.to(torch.float16)
    new = place.with_name(place.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    pipe.save_pretrained(new, max_shard_size="14MB")
    for path in (new / "model_index.json", *new.glob("*/config.json")):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # the folder it was trained in
        path.write_text(json.dumps(config, indent=2) + "\n")
    replace(new, place)
    loaded = StableDiffusionPipeline.from_pretrained(place)
    for name in ("unet", "vae", "text_encoder"):
        module = getattr(loaded, name)
        if {p.dtype for p in module.parameters()} != {torch.float32}:
            raise RuntimeError(f"{name} does not load in float32")


def export_clip(source: Path, place: Path) -> None:
    new = place.with_name(place.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source, new)
    weights = load_file(new / WEIGHTS)
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(half, new / WEIGHTS)
    replace(new, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("assets", type=Path)
    args = parser.parse_args()
    if (args.data / "pipeline").exists():
        export_pipeline(args.data / "pipeline", args.assets / "emoji")
    for name in ("clip_guide", "clip_judge"):
        if (args.data / name).exists():
            export_clip(args.data / name, args.assets / name)
    for file in sorted(args.assets.rglob("*.safetensors")):
        print(f"{file.stat().st_size / 1e6:6.2f} MB  {file}")


if __name__ == "__main__":
    main()
