"""Algorithms that finetune a diffusion model towards a reward, one paper a file.

`make_algorithm` builds one from a name, or from ``{"name": ..., option: value}``.
"""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from diffreward.algorithms.base import (
    Algorithm,
    DenoisingAlgorithm,
    History,
    PathwiseAlgorithm,
    TrajectoryAlgorithm,
)

ALGORITHMS = {
    "prdp": "prdp:PRDP",
    "ddpo": "ddpo:DDPO",
    "grpo": "grpo:GRPO",
    "dpok": "dpok:DPOK",
    "reinforce": "reinforce:REINFORCE",
    "refl": "refl:ReFL",
    "draft": "draft:DRaFT",
    "alignprop": "draft:AlignProp",
    "raft": "raft:RAFT",
    "drakes": "drakes:DRAKES",
    "dpo": "dpo:DPO",
    "kto": "dpo:KTO",
    "dragon": "dragon:DRAGON",
    "ctrl_u": "ctrl_u:CtrlU",
}
"""Name -> module and class; modules are imported when one is built."""

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "DenoisingAlgorithm",
    "History",
    "PathwiseAlgorithm",
    "TrajectoryAlgorithm",
    "make_algorithm",
]


def make_algorithm(spec: str | Mapping[str, Any] | Algorithm) -> Algorithm:
    """An algorithm from its name, a mapping, or itself.

    Args:
        spec: ``"prdp"``; ``{"name": "prdp", "beta": 2.0}``; with a ``preset``, a named set of
            hyper-parameters which the other options override:
            ``{"name": "prdp", "preset": "paper_small", "passes": 1}``.

    Raises:
        ValueError: an unknown name, preset or option (the nearest known one is named), or a value
            out of range.
    """
    if isinstance(spec, Algorithm):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in options:
        raise ValueError(f"an algorithm is given as {{'name': ..., option: value}}, not {spec!r}")
    name = options.pop("name")
    if name not in ALGORITHMS:
        raise ValueError(_unknown("algorithm", str(name), ALGORITHMS))
    module, attribute = ALGORITHMS[name].split(":")
    kind = getattr(importlib.import_module(f"diffreward.algorithms.{module}"), attribute)
    preset = options.pop("preset", None)
    presets = getattr(kind, "presets", {})
    if preset is not None and preset not in presets:
        raise ValueError(_unknown(f"preset of {name}", str(preset), presets))
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(_unknown(f"option of {name}", option, known))
    return kind(**{**presets.get(preset, {}), **options})


def _unknown(what: str, came: str, known) -> str:
    near = difflib.get_close_matches(came, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"there is no {what} {came!r}{hint} There is {', '.join(known) or 'none'}"
