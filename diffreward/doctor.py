"""``diffreward doctor``: what is installed, what is there to compute on, and what is missing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from diffreward import __version__
from diffreward._assets import asset_path

# The embedded models, and what the defaults use.
ASSETS = (
    "emoji", "clip_guide", "clip_judge", "prompts/scenes.jsonl", "proteinmpnn", "structures", "dna"
)  # fmt: skip
# These fail on import when their builds do not fit together.
IMPORTS = ("torch", "torchvision", "diffusers", "transformers", "open_clip", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        state: "ok", "note" (nothing is wrong, but worth knowing) or "broken".
        what: was looked at.
        found: is there.
        advice: what to do about it.
    """

    state: str
    what: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Look at everything, one finding after the other."""
    yield Finding("ok", "diffreward", __version__)
    yield from python_and_packages()
    yield from imports()
    yield from devices()
    yield from assets()
    yield from rewards()
    yield from downloads()


def python_and_packages() -> Iterator[Finding]:
    """Installed versions against those which the installed package asks for."""
    try:
        about = metadata.metadata("diffreward")
    except metadata.PackageNotFoundError:
        yield Finding(
            "note", "package", "imported from a folder and not installed: versions not checked",
            "pip install -e . in that folder",
        )  # fmt: skip
        return
    python = platform.python_version()
    wanted = about["Requires-Python"] or ""
    fits = Requirement(f"python{wanted}").specifier.contains(python, prereleases=True)
    advice = "" if fits else f"diffreward needs Python {wanted}"
    yield Finding("ok" if fits else "broken", "python", python, advice)

    extras: dict[str, list[str]] = {}
    for line in metadata.requires("diffreward") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            yield _package(requirement)
            continue
        for extra in about.get_all("Provides-Extra") or []:
            if requirement.marker.evaluate({"extra": extra}):
                if _package(requirement).state != "ok":
                    extras.setdefault(extra, []).append(requirement.name)
                else:
                    extras.setdefault(extra, [])
    for extra, missing in extras.items():
        found = f"missing {', '.join(missing)}" if missing else "installed"
        advice = f"optional: pip install 'diffreward[{extra}]'" if missing else ""
        yield Finding("note" if missing else "ok", f"extra [{extra}]", found, advice)


def _package(requirement: Requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    upgrade = f"pip install --upgrade '{name}{wanted}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("broken", name, "not installed", upgrade)
    if not requirement.specifier.contains(Version(version), prereleases=True):
        return Finding("broken", name, f"{version}, but {wanted} is needed", upgrade)
    return Finding("ok", name, version)


def imports() -> Iterator[Finding]:
    """Whether the large packages can be imported together."""
    failed = False
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as err:
            failed = True
            reason = " ".join(f"{type(err).__name__}: {err}".split())
            yield Finding(
                "broken", f"import {name}", reason,
                "reinstall it; torch and torchvision must come from the same index",
            )  # fmt: skip
    if not failed:
        yield Finding("ok", "imports", ", ".join(IMPORTS))


def devices() -> Iterator[Finding]:
    """What there is to compute on, and in which precision."""
    try:
        import torch
    except Exception:
        return  # `imports` said so
    yield Finding("ok", "cpu", f"{torch.get_num_threads()} threads, float32")
    for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = (memory / 2**30 for memory in torch.cuda.mem_get_info(n))
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        name = torch.cuda.get_device_name(n)
        yield Finding("ok", f"cuda:{n}", f"{name}, {free:.1f} of {total:.1f} GiB free, {half}")
    if torch.backends.mps.is_available():
        yield Finding("ok", "mps", "float32, float16")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield Finding(
            "note", "gpu", f"none found by torch, which is built {built}",
            "the embedded models need none; for others, install a torch build and driver that fit",
        )  # fmt: skip


def assets() -> Iterator[Finding]:
    """The embedded models and data."""
    for name in ASSETS:
        files = _files(name)
        if not any(file.suffix in (".safetensors", ".jsonl", ".pdb") for file in files):
            yield Finding(
                "broken", f"embedded {name}", "missing",
                "reinstall diffreward; in a checkout, git checkout -- assets",
            )  # fmt: skip
            continue
        size = sum(file.stat().st_size for file in files) / 1e6
        yield Finding("ok", f"embedded {name}", f"{size:.2f} MB")


def _files(name: str) -> list[Path]:
    try:
        path = asset_path(name)
    except FileNotFoundError:
        return []
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def rewards() -> Iterator[Finding]:
    """The registry, with what plugins add."""
    import warnings

    try:
        from diffreward.rewards import available_rewards
    except Exception as err:
        yield Finding("broken", "rewards", f"{type(err).__name__}: {err}")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = len(available_rewards())
    yield Finding("ok", "rewards", f"{count} registered")
    for warning in caught:
        yield Finding("note", "plugin", str(warning.message), "upgrade or remove that package")


def downloads() -> Iterator[Finding]:
    """Where downloaded models go, and whether they may be downloaded."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free / 1e9
    yield Finding("ok", "model cache", f"{cache}, {models} models, {free:.0f} GB free on its disk")
    offline = [n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(n)]
    if offline:
        yield Finding(
            "note", "network", f"{' and '.join(offline)} set: only cached models can be loaded",
            f"unset {' '.join(offline)} to allow downloads",
        )  # fmt: skip
    else:
        yield Finding("ok", "network", "downloads allowed (not tried)")
    if not os.access(Path.cwd(), os.W_OK):
        yield Finding(
            "note", "results", "the current folder is not writable", "steer with --output FOLDER"
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
