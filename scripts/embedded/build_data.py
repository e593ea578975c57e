"""Build the training data of the embedded model: emoji, rendered scenes, and the tokenizer.

    mkdir npm && cd npm
    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat emojibase-data
    for f in *.tgz; do mkdir -p x/${f%.tgz}; tar xzf $f -C x/${f%.tgz}; done; cd ..
    python -m scripts.embedded.build_data npm/x DATA --scenes 80000

A few minutes on one core of an AMD EPYC. Only two emoji styles are used, for their licences: Noto
Emoji (Apache-2.0) and Fluent UI Emoji flat (MIT); labels and tags come from emojibase (MIT, derived
from Unicode CLDR). Only concepts that a small model can learn are kept: faces, hearts, geometric
shapes, fruit, vegetables, sweets, animal faces and a few more. Needs ``resvg-py``.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from diffreward.rewards.shapes import random_scene, render
from scripts.embedded.common import CONTEXT

STYLES = {"noto": "iconify-json-noto-*", "fluent": "iconify-json-fluent-emoji-flat-*"}
PLACEMENTS = 12  # (scale, shift, flip) variants of every emoji; the first is centred and upright
SUBGROUPS = """face-smiling face-affection face-tongue face-neutral-skeptical face-sleepy
    face-unwell face-glasses face-concerned face-negative cat-face heart food-fruit food-vegetable
    food-sweet""".split()
LABELS = """red circle;orange circle;yellow circle;green circle;blue circle;purple circle;
    brown circle;black circle;white circle;red square;orange square;yellow square;green square;
    blue square;purple square;brown square;black large square;white large square;
    large orange diamond;large blue diamond;red triangle pointed up;red triangle pointed down;
    cowboy hat face;partying face;thinking face;face with hand over mouth;ghost;alien;robot;
    clown face;monkey face;dog face;wolf;fox;raccoon;cat face;lion;tiger face;horse face;cow face;
    pig face;mouse face;hamster;rabbit face;bear;polar bear;koala;panda;baby chick;
    front-facing baby chick;bird;penguin;duck;owl;frog;turtle;fish;tropical fish;octopus;crab;
    whale;snail;butterfly;lady beetle;cherry blossom;sunflower;blossom;tulip;rose;seedling;
    evergreen tree;deciduous tree;cactus;shamrock;four leaf clover;maple leaf;mushroom;star;
    glowing star;sun;full moon;crescent moon;cloud;rainbow;snowflake;fire;droplet;high voltage;
    hamburger;pizza;french fries;hot dog;egg;cooking;bread;cheese wedge;popcorn;balloon;
    soccer ball;basketball;baseball;tennis;football;key;light bulb;bell;gem stone;crown;house;
    automobile;rocket""".replace("\n", "").split(";")
LABELS = {label.strip() for label in LABELS}


def clean(text: str) -> str:
    """Lower-case ASCII without the commas and colons that separate the parts of a caption."""
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    text = text.encode("ascii", "ignore").decode().lower()
    return re.sub(r"[\s,:]+", " ", text).strip()


def draw(icon: dict, size: int, width: int, height: int) -> Image.Image:
    """Render one iconify icon at ``size`` pixels on white."""
    width, height = icon.get("width", width), icon.get("height", height)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{icon.get("left", 0)} {icon.get("top", 0)} '
        f'{width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def placements(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """(PLACEMENTS, 64, 64, 3): shrunk to 76-94 % of the canvas, shifted, half of them flipped."""
    out = []
    for k in range(PLACEMENTS):
        side = 60 if k == 0 else int(rng.integers(49, 61))
        free = 64 - side
        x, y = (free // 2,) * 2 if k == 0 else (int(v) for v in rng.integers(0, free + 1, 2))
        canvas = Image.new("RGB", (64, 64), "white")
        canvas.paste(image.resize((side, side), Image.BOX), (x, y))
        out.append(np.asarray(canvas)[:, :: -1 if k % 2 else 1])
    return np.stack(out)


def build_emoji(packages: Path, rng: np.random.Generator) -> tuple[np.ndarray, list[dict]]:
    book = next(packages.glob("emojibase-data-*")) / "package"
    groups = json.loads((book / "meta/groups.json").read_text())["subgroups"]
    entries = json.loads((book / "en/data.json").read_text())
    images, rows = [], []
    for style, folder in STYLES.items():
        package = next(packages.glob(folder)) / "package"
        icons = json.loads((package / "icons.json").read_text())
        names = json.loads((package / "chars.json").read_text())
        size = icons.get("width", 16), icons.get("height", 16)
        for entry in entries:
            subgroup = groups.get(str(entry.get("subgroup")))
            if subgroup not in SUBGROUPS and entry["label"] not in LABELS:
                continue
            code = "-".join(p for p in entry["hexcode"].lower().split("-") if p != "fe0f")
            name = names.get(code)
            name = icons.get("aliases", {}).get(name, {}).get("parent", name)
            if name not in icons["icons"]:
                print("missing", style, entry["label"])
                continue
            image = draw(icons["icons"][name], 240, *size)
            images.append(placements(image, rng))
            tags = [clean(tag) for tag in entry.get("tags", [])]
            rows.append(
                {
                    "style": style,
                    "hex": code,
                    "label": clean(entry["label"]),
                    "tags": [tag for tag in tags if tag and len(tag.split()) <= 2],
                    "subgroup": subgroup,
                }
            )
    return np.stack(images), rows


def build_scenes(count: int, rng: np.random.Generator, out: Path) -> list[str]:
    """Render ``count`` scenes, none of them held out, into ``out`` (.npy); return the captions."""
    pictures = np.lib.format.open_memmap(out, "w+", np.uint8, (count, 64, 64, 3))
    captions = []
    while len(captions) < count:
        scene = random_scene(rng)
        if not scene.held_out():
            pictures[len(captions)] = render(scene, rng)
            captions.append(scene.caption())
    return captions


def build_tokenizer(corpus: list[str], size: int, out: Path) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's form: lower case, ``</w>`` ends a word, ``size`` entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2 - len(alphabet),
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"]
    # Without every byte as a whole word, a rare "," would become the unknown token, which is the
    # end token, and CLIP would pool there.
    for token in [f"{byte}</w>" for byte in alphabet] + ["<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    tok = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)
    tok.save_pretrained(out)
    return CLIPTokenizer.from_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packages", type=Path, help="folder of the unpacked npm packages")
    parser.add_argument("data", type=Path, help="folder to write")
    parser.add_argument("--scenes", type=int, default=80_000)
    parser.add_argument("--vocabulary", type=int, default=1280)
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    images, rows = build_emoji(args.packages, rng)
    np.save(args.data / "emoji.npy", images)
    (args.data / "emoji.json").write_text(json.dumps(rows, indent=0))
    print(len(rows), "emoji of", len({row["hex"] for row in rows}), "concepts")

    captions = build_scenes(args.scenes, rng, args.data / "scenes.npy")
    (args.data / "scenes.json").write_text(json.dumps(captions, indent=0))
    print(len(captions), "scenes of", len(set(captions)), "captions")

    corpus = [part for row in rows for part in [row["label"]] * 3 + row["tags"]]
    corpus += [f"{style} style" for style in STYLES] * 50 + captions[:4000]
    tok = build_tokenizer(corpus, args.vocabulary, args.data / "tokenizer")
    lengths = [len(tok(row["label"]).input_ids) for row in rows]
    lengths += [len(tok(caption).input_ids) for caption in captions[:4000]]
    print(len(tok), "tokens; longest label or caption", max(lengths), "of", CONTEXT)
    print(tok.tokenize("a red heart above two blue circles, noto style"))


if __name__ == "__main__":
    main()
