"""What runs leave behind: folders, files that are whole or not there, JSON lines, tables.

Every file is written beside its final name and then renamed, so that a file which is there is
whole; a folder which is there is never written into by another run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffreward import __version__


@contextmanager
def run_folder(output: str | Path | None, verb: str) -> Iterator[Path]:
    """A new folder for a run; if the run fails before it writes anything, it goes again.

    Args:
        output: its path; None: ``runs/<verb>-<date>-<time>``, numbered if that is taken.
        verb: what the run does.

    Raises:
        FileExistsError: ``output`` exists.
        OSError: it cannot be created.
    """
    folder = _new_folder(output, verb)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # rmdir removes only what is empty
            folder.rmdir()
            if output is None:
                folder.parent.rmdir()
        raise


def _new_folder(output: str | Path | None, verb: str) -> Path:
    stem = time.strftime(f"{verb}-%Y%m%d-%H%M%S")
    names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
    for folder in [Path("runs", name) for name in names] if output is None else [Path(output)]:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(
        f"{output or Path('runs', stem)} exists, and results are never overwritten: choose another "
        "--output, or move it away"
    )


def write_atomic(path: Path, write: Callable[[Path], Any], beside: Path | None = None) -> None:
    """Write a file, whole or not at all, even if the power fails.

    Args:
        path: its name; its folder is made if need be.
        write: writes to the path it is given, which has the same ending.
        beside: folder for the unfinished file, on the same disk; None: that of ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = (beside or path.parent) / f".unfinished-{os.getpid()}-{path.name}"
    try:
        write(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line. NaN becomes null; infinities the strings "inf", "-inf"."""
    lines = (json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in rows)
    write_text(path, "".join(line + "\n" for line in lines))


def fasta(records: Iterable[tuple[str, dict[str, float], str]]) -> str:
    """Named sequences with their rewards: ``>name label=value ...`` and the letters, on one line.

    Rewards that could not be judged (NaN) are left out, and a label's spaces become underscores.
    """
    lines = []
    for name, scores, sequence in records:
        known = {label.replace(" ", "_"): v for label, v in scores.items() if not math.isnan(v)}
        lines.append(" ".join([f">{name}", *(f"{label}={v:.6g}" for label, v in known.items())]))
        lines.append(sequence)
    return "".join(line + "\n" for line in lines)


def plain(value: Any) -> Any:
    """``value`` with tensors as numbers or lists, and only numbers that JSON has."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def environment(device: torch.device | str, **more: Any) -> dict[str, Any]:
    """Versions, device and date of a run, for ``env.json``; nothing that names user or machine."""
    device = torch.device(device)
    packages = {}
    for name in ("torch", "diffusers", "transformers", "open_clip_torch", "numpy"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "diffreward": __version__,
        "python": platform.python_version(),
        "platform": platform.system(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": packages,
        **more,
    }


def short(value: float) -> str:
    """Three decimals; of what is smaller than 0.1, three digits, which rewards like losses need."""
    return f"{value:.3g}" if 0 < abs(value) < 0.1 else f"{value:.3f}"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False,
    numbers: bool = True,
) -> str:  # fmt: skip
    """Aligned columns; with ``numbers``, all but the first to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]

    def show(line: Sequence[str]) -> str:
        cells = [
            text.rjust(width) if numbers and c > 0 else text.ljust(width)
            for c, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |" if markdown else "   ".join(cells).rstrip()

    shown = [show(line) for line in lines]
    if markdown:
        ends = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        shown.insert(1, f"| {' | '.join(ends)} |")
    return "\n".join(shown)
