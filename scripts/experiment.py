"""What experiments share: folders of runs that go on where they were, and intervals.

A run has a folder of its own in the experiment's, and is done when its ``row.json`` is there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffreward.files import write_atomic, write_text


def load(output: Path, name: str) -> dict | None:
    """The row of a run, None while it is not done."""
    path = output / name / "row.json"
    return json.loads(path.read_text()) if path.exists() else None


def same_sizes(output: Path, sizes: Any) -> None:
    """Refuse to mix runs of different sizes in one folder.

    Args:
        sizes: a dataclass, or a mapping of names to some.

    Raises:
        SystemExit: the folder has runs of others; the message names what differs.
    """
    plain = asdict(sizes) if is_dataclass(sizes) else {n: asdict(s) for n, s in sizes.items()}
    path, now = output / "sizes.json", json.loads(json.dumps(plain))  # lists, not tuples
    if not path.exists():
        write_text(path, json.dumps(now, indent=2) + "\n")
    elif (then := json.loads(path.read_text())) != now:
        wrong = [f"{k} {then.get(k)} (now {now[k]})" for k in now if then.get(k) != now[k]]
        wrong = ", ".join(wrong) or f"other sizes, {then}"
        raise SystemExit(f"the runs in {output} have {wrong}; choose another --output")


def save_data(path: Path, data: Tensor) -> None:
    write_atomic(path, lambda p: save_file({"data": data.contiguous()}, p))


def load_data(path: Path) -> Tensor:
    return load_file(path)["data"]


def interval(d: Float[np.ndarray, "s u"], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of (seeds, units) and its 95 % interval: both are drawn anew, independently.

    Source: the pigeonhole bootstrap, Owen 2007, arXiv:0704.0756. With three seeds it is rough; with
    one it knows of units alone.
    """
    rng = np.random.default_rng(0)
    seeds, units = (rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in d.shape)
    low, high = np.quantile(np.einsum("rs,su,ru->r", seeds, d, units), [0.025, 0.975])
    return float(d.mean()), float(low), float(high)
