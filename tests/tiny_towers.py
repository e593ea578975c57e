"""Tiny random towers in the layouts in which real ones are published, and pictures for them."""

import json
import string
from pathlib import Path

import numpy as np
import open_clip
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from diffreward.samples import Samples

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def photos(b: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    """(b, h, w, 3) uint8: smooth colour fields with hard-edged rectangles and some grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w] / 16
    waves = rng.uniform(0.5, 2, (b, 1, 1, 3)) * x[..., None] + rng.uniform(0, 6, (b, 1, 1, 3))
    images = 128 + 100 * np.sin(waves + y[..., None] * rng.uniform(-1, 1, (b, 1, 1, 3)))
    images[:, h // 4 : h // 2, w // 4 : 3 * w // 4] = rng.uniform(0, 255, (b, 1, 1, 3))
    return (images + rng.normal(0, 3, images.shape)).clip(0, 255).round().astype(np.uint8)


def to_samples(pixels: np.ndarray, prompts: list[str] | None = None) -> Samples:
    return Samples(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, "image", prompts)


def letter_tokenizer(length: int) -> transformers.CLIPTokenizer:
    letters = [*string.ascii_lowercase, ","]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def open_clip_config(vocab_size: int) -> dict:
    return {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8
        },
        "text_cfg": {
            "context_length": 32, "vocab_size": vocab_size, "width": 32, "heads": 2, "layers": 2
        },
    }  # fmt: skip


def save_open_clip(folder: Path) -> Path:
    """The folder layout open_clip reads with ``local-dir:``."""
    tokenizer = letter_tokenizer(32)
    tokenizer.save_pretrained(folder)
    config = open_clip_config(len(tokenizer))
    torch.manual_seed(0)
    save_file(open_clip.model.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    config["text_cfg"]["hf_tokenizer_name"] = "in this folder"
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    return folder


def open_clip_architecture(folder: Path, name: str) -> nn.Module:
    """Registers an architecture with open_clip's own vocabulary; its random network."""
    config = open_clip_config(49408)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(1)
    return open_clip.model.CLIP(**config).eval()


_SIDE = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64)


def save_transformers_clip(folder: Path) -> Path:
    """As PickScore and OpenAI's CLIP are published for transformers."""
    tokenizer = letter_tokenizer(24)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    config = transformers.CLIPConfig(
        text_config=dict(
            _SIDE,
            vocab_size=len(tokenizer),
            max_position_embeddings=24,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(_SIDE, image_size=32, patch_size=8),
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(
        folder
    )
    return folder


def save_siglip(folder: Path) -> Path:
    """As SigLIP is published for transformers (its tokenizer apart)."""
    tokenizer = letter_tokenizer(20)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.SiglipConfig(
        text_config=dict(_SIDE, vocab_size=len(tokenizer), max_position_embeddings=20),
        vision_config=dict(_SIDE, image_size=32, patch_size=8),
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def linear_head(width: int, layers: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of ``width``-1024-128-64-16-1, named after ``layers``, of a spread around 5."""
    torch.manual_seed(seed)
    widths = [width, 1024, 128, 64, 16, 1]
    state = {}
    for name, a, b in zip(layers, widths[:-1], widths[1:], strict=True):
        state[f"{name}.weight"] = torch.randn(b, a) / a**0.5
        state[f"{name}.bias"] = torch.randn(b) / 10
    state[f"{layers[-1]}.bias"] += 5
    return state


def affine(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a linear head computes, in float64: y = Wx + b, layer after layer."""
    names = dict.fromkeys(key.rsplit(".", 1)[0] for key in state)
    x = x.double()
    for name in names:
        x = x @ state[f"{name}.weight"].double().T + state[f"{name}.bias"].double()
    return x.squeeze(-1)


def assert_gap(value: torch.Tensor, truth: torch.Tensor, percent: float) -> None:
    """The largest difference is below this share of what tells the images apart."""
    gap, spread = (value - truth).abs().max().item(), truth.std().item()
    assert spread > 0.01
    assert gap < percent / 100 * spread, f"a gap of {gap:.2g}, {gap / spread:.1%} of the spread"


def conformance_samples() -> Samples:
    """Four different pictures, two of which show their prompt."""
    from diffreward.rewards.shapes import parse, render

    prompts = ["a red heart", "a blue circle", "two green stars", "a red heart above a blue ring"]
    rng = np.random.default_rng(0)
    shown = [render(parse(prompt), rng) for prompt in (prompts[0], prompts[2])]
    unrelated = photos(2, 64, 64)
    pixels = np.stack([shown[0], unrelated[0], shown[1], unrelated[1]])
    samples = to_samples(pixels, prompts)
    samples.context["control"] = samples.data[[2, 0, 0, 2]]
    return samples
