"""Write the held-out prompts, assets/prompts/scenes.jsonl: six categories of twenty.

    python -m scripts.embedded.make_prompts assets/prompts/scenes.jsonl

Seconds, on any machine. The composed scenes are of the eighth that no embedded model was trained
on (``Scene.held_out``). The single objects are not held out: there are only 42, all trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from diffreward.rewards.shapes import CATEGORIES, random_scene

PER_CATEGORY = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rng, lines = np.random.default_rng(2026), []
    for category in CATEGORIES:
        chosen: dict[str, None] = {}  # in order; two wordings of a scene are two prompts
        while len(chosen) < PER_CATEGORY:
            scene = random_scene(rng, category)
            if scene.held_out() or scene.count == 1:
                chosen[scene.caption()] = None
        lines += [json.dumps({"prompt": p, "category": category}) for p in chosen]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
