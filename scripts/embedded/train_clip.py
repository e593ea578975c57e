"""Train one of the two small CLIPs (open_clip): the guide (half 0) or the judge (half 1).

    nice -n 5 python -m scripts.embedded.train_clip DATA guide --minutes 25
    nice -n 5 python -m scripts.embedded.train_clip DATA judge --minutes 25

One thread of a 2-core AMD EPYC each. The two differ in seed and in data: emoji by a hash of style
and concept, composed scenes by a hash of the caption (single objects are too few to divide and are
seen by both); held-out scenes by neither. Half of a batch are emoji of distinct concepts, half are
groups of four scenes that differ in one attribute, so that count, position and attribution have to
be learnt. Pictures are blurred, coarsened and given noise, as generated ones are. Resumes from
DATA/clip_<name>.pt.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffreward.rewards.shapes import (
    COLOURS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    Item,
    Scene,
    random_scene,
    render,
)
from scripts.embedded.common import (
    CONTEXT,
    Clock,
    bucket,
    emoji_caption,
    emoji_key,
    load,
    pixels,
    save,
    schedule,
    tokenizer,
    tokens,
)

HALF = {"guide": 0, "judge": 1}
GROUPS, VARIANTS, EMOJI, RATE = 16, 4, 64, 1e-3


def config(vocabulary: int) -> dict:
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 64,
            "layers": 4,
            "width": 128,
            "head_width": 32,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "local",  # open_clip then reads the tokenizer beside the weights
            "width": 128,
            "heads": 4,
            "layers": 3,
        },
    }


def mutate(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one attribute changed: a colour, shape, count, the relation, or a swap."""
    items = list(scene.items)
    i = rng.randrange(len(items))
    item = items[i]
    kinds = ["colour", "shape", "count"]
    if len(items) == 2:
        kinds += ["swap", "swap"]
    if scene.relation:
        kinds += ["relation", "relation"]
    kind = rng.choice(kinds)
    if kind == "colour":
        colour = rng.choice([c for c in COLOURS if c != item.colour])
        items[i] = Item(item.shape, colour, item.count)
    elif kind == "shape":
        shape = rng.choice([s for s in SHAPES if s != item.shape])
        items[i] = Item(shape, item.colour, item.count)
    elif kind == "count":
        counts = [n for n in range(1, MAX_OBJECTS + 1) if n != item.count]
        items[i] = Item(item.shape, item.colour, rng.choice(counts))
    elif kind == "swap":
        a, b = items
        items = [Item(a.shape, b.colour, a.count), Item(b.shape, a.colour, b.count)]
    else:
        return Scene(scene.items, rng.choice([r for r in RELATIONS if r != scene.relation]))
    return Scene(tuple(items), scene.relation)


def family(rng: np.random.Generator, pick: random.Random, allowed, taken: set) -> list[Scene]:
    """A scene and near misses of it, VARIANTS in all, distinct and none of them in ``taken``."""
    while True:
        base = random_scene(rng)
        if any(item.colour is None for item in base.items):
            continue
        group = {}
        for attempt in range(12):
            scene = base if attempt == 0 else mutate(base, pick)
            same_item = len({(item.shape, item.colour) for item in scene.items}) < len(scene.items)
            if scene.count > MAX_OBJECTS or same_item or not allowed(scene):
                continue
            key = scene.canonical()
            if key not in taken:
                group[key] = scene
            if len(group) == VARIANTS:
                taken.update(group)
                return list(group.values())


def degrade(x: torch.Tensor) -> torch.Tensor:
    """Make pictures look generated: blurred, of coarse pixels, paler or stronger, noisy."""
    draw = torch.rand(len(x))[:, None, None, None]
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(draw < 0.25, soft, torch.where(draw > 0.75, coarse, x))
    x = 1 - (1 - x) * torch.empty(len(x), 1, 1, 1).uniform_(0.85, 1.1)
    return (x + torch.randn_like(x) * torch.rand(len(x), 1, 1, 1) * 0.12).clamp(-1, 1)


@torch.no_grad()
def evaluate(model, tok, emoji: np.ndarray, rows: list[dict], half: int) -> dict[str, float]:
    """Retrieval accuracies.

    ``scene``: of a held-out scene's caption and three near misses, is the right one nearest (chance
    0.25)? ``own`` / ``other emoji``: is an emoji's label the nearest among all labels, for emoji of
    this model's half and of the other half?
    """
    model.eval()
    rng, pick, groups = np.random.default_rng(99), random.Random(99), []
    while len(groups) < 200:
        groups.append(family(rng, pick, lambda scene: scene.held_out(), set()))
    images = pixels(np.stack([render(group[0], rng) for group in groups]))
    texts = [scene.caption() for group in groups for scene in group]
    t = model.encode_text(tokens(tok, texts), normalize=True).view(200, VARIANTS, -1)
    near = (model.encode_image(images, normalize=True)[:, None] * t).sum(-1).argmax(1)
    out = {"scene": (near == 0).float().mean().item()}
    labels = sorted({row["label"] for row in rows})
    t = model.encode_text(tokens(tok, labels), normalize=True)
    for name, wanted in (("own emoji", half), ("other emoji", 1 - half)):
        idx = [i for i, row in enumerate(rows) if bucket(emoji_key(row), 2) == wanted]
        score = model.encode_image(pixels(emoji[idx, 0]), normalize=True) @ t.T
        right = torch.tensor([labels.index(rows[i]["label"]) for i in idx])
        rank = (score > score.gather(1, right[:, None])).sum(1)
        out |= {name: (rank == 0).float().mean().item()}
        out |= {name + " top-5": (rank < 5).float().mean().item()}
    model.train()
    return out


def export(model, tok, out: Path) -> None:
    """Write the folder that ``open_clip`` opens as ``local-dir:<out>``."""
    out.mkdir(parents=True, exist_ok=True)
    half = [0.5, 0.5, 0.5]
    preprocess = {"size": 64, "mean": half, "std": half, "interpolation": "bicubic"}
    settings = {"model_cfg": config(len(tok)), "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tok.save_pretrained(out)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("name", choices=HALF)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    half = HALF[args.name]
    torch.manual_seed(100 + half)

    emoji, rows, _, _ = load(args.data)
    tok = tokenizer(args.data)
    by_label: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if bucket(emoji_key(row), 2) == half:
            by_label.setdefault(row["label"], []).append(i)
    labels = sorted(by_label)

    def allowed(scene: Scene) -> bool:
        mine = scene.count == 1 or bucket("half " + scene.canonical().caption(), 2) == half
        return mine and not scene.held_out()

    settings = config(len(tok))
    model = open_clip.CLIP(
        settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"], quick_gelu=False
    )
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, {len(labels)} labels")
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.05)
    step, clock, path = 0, Clock(), args.data / f"clip_{args.name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, clock = state["step"], Clock(state["minutes"], state["cpu"])
    rng, pick = np.random.default_rng([half, step]), random.Random(2 * step + half)

    while clock.minutes < args.minutes:
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * schedule(clock.minutes / args.minutes)
        taken: set = set()
        scenes = [s for _ in range(GROUPS) for s in family(rng, pick, allowed, taken)]
        captions = [scene.caption() for scene in scenes]
        drawn = {caption.split(" ", 1)[1] for caption in captions}
        # "red heart" is both an emoji and a scene; in one batch they would be false negatives.
        some = [label for label in pick.sample(labels, EMOJI) if label not in drawn]
        chosen = [pick.choice(by_label[label]) for label in some]
        captions += [emoji_caption(rows[i], pick) for i in chosen]
        placed = emoji[chosen, rng.integers(emoji.shape[1], size=len(chosen))]
        x = pixels(np.concatenate([np.stack([render(s, rng) for s in scenes]), placed]))
        x = degrade(x)
        # On a CPU, the backward pass of PyTorch's fused attention is slow: hence MATH.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image = model.encode_image(x, normalize=True).float()
            text = model.encode_text(tokens(tok, captions), normalize=True).float()
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        right = torch.arange(len(x))
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 200 == 0 or clock.minutes >= args.minutes:
            scores = {k: round(v, 3) for k, v in evaluate(model, tok, emoji, rows, half).items()}
            print(
                f"step {step} {clock.minutes:.1f} min ({clock.cpu_minutes:.1f} CPU) "
                f"loss {loss.item():.3f} {scores}",
                flush=True,
            )
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            save(state | {"minutes": clock.minutes, "cpu": clock.cpu_minutes}, path)
            export(model, tok, args.data / f"clip_{args.name}")


if __name__ == "__main__":
    main()
