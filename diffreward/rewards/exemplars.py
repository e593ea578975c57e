"""Exemplars: what a set of samples, or a sample, is compared with: a distribution by example.

exemplars = load_exemplars("photos/", "clip")                # images, texts, sequences, sounds
exemplars = load_exemplars(["a red heart", "a star"], "clip")  # texts, for images
save_exemplars("photos.safetensors", exemplars)              # to be loaded in their place

While anyone holds an encoder, the last few sources that it embedded are remembered, with what is
known of each: rewards that share exemplars and an encoder embed them once.
"""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffreward._assets import asset_path
from diffreward.files import write_atomic
from diffreward.rewards.embedding_cache import Cached, content_hashes
from diffreward.rewards.encoders import Encoder, EncoderSpec, embed, make_encoder
from diffreward.rewards.gaussians import Gaussian, Moments, shrunk
from diffreward.rewards.tokens import read_sequences
from diffreward.samples import ALPHABETS, Samples, to_tokens

FORMAT = "diffreward exemplars 1"
"""Of the files that `save_exemplars` writes."""

Source = str | Path | Sequence | Samples
"""What `load_exemplars` takes, or Exemplars themselves."""


@dataclass(frozen=True, eq=False)
class Exemplars:
    """Embeddings of exemplars, and their statistics.

    Attributes:
        features: ``(n, d)`` float32, in the order of the source; None: only statistics are known.
        gaussian: of the embeddings; None where it was not asked for.
        encoder: `Encoder.key` of what embedded them.
        parts: the Gaussian of the embeddings of all parts of all exemplars; None where it was not
            asked for.
        shrinkage: of both Gaussians, see `diffreward.rewards.gaussians.shrunk`.
    """

    features: Float[Tensor, "n d"] | None
    gaussian: Gaussian | None
    encoder: str
    parts: Gaussian | None = None
    shrinkage: float = 0.0

    def to(self, device: torch.device | str) -> Exemplars:
        """The same with every tensor on ``device``."""
        moved = {
            name: None if value is None else value.to(device)
            for name in ("features", "gaussian", "parts")
            for value in [getattr(self, name)]
        }
        return replace(self, **moved)


def load_exemplars(
    source: Source | Exemplars,
    encoder: EncoderSpec,
    *,
    shrinkage: float | int = 0.0,
    batch: int = 64,
    cache: str | Path | None = None,
    features: bool = True,
    gaussian: bool = True,
    parts: bool = False,
    column: str | None = None,
    device: torch.device | str | None = None,
) -> Exemplars:
    """Embed exemplars, or load what is known of them.

    Args:
        source: a folder (all images, sounds or FASTA files below it, by what the encoder takes); a
            manifest (.jsonl, .csv, .tsv, .parquet) of paths relative to it, of sequences or texts;
            a FASTA file; a .txt file, one text or sequence a line; a list of texts, of sequences,
            or of `pathlib.Path`; Samples; ``"embedded:NAME"``; Exemplars; or a .safetensors file
            written by `save_exemplars`. Texts, for an encoder of images or sounds, are embedded by
            its text side.
        encoder: what `make_encoder` takes; for saved exemplars the one they were made with.
        shrinkage: of the Gaussians, from 0 to 1.
        batch: exemplars embedded at once.
        cache: folder in which embeddings are remembered by content, see `Cached`.
        features: keep the embeddings themselves. Without, memory does not grow with the number of
            exemplars, beyond 64 MB that are remembered (of texts and sequences, the letters are
            kept, and of files the paths).
        gaussian: of the embeddings; without, none is computed, and few exemplars are not warned of.
        parts: the Gaussian of all their parts, too.
        column: of a manifest; by default the first of the usual names.
        device: where files are embedded; by default CUDA if there is one, else the CPU. What is
            returned is on the CPU.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: fewer than 2 exemplars, a file that cannot be read, sizes of which the encoder
            makes embeddings of different dimensions, a modality that it does not take, a
            statistics file of another encoder or without what is asked for.

    Warns:
        UserWarning: a Gaussian of fewer exemplars than dimensions, without shrinkage.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, but {batch} came")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage is a number from 0 to 1, but {shrinkage} came")
    encoder = make_encoder(encoder)
    path = _path(source)
    if isinstance(source, Exemplars) or (path and path.suffix == ".safetensors"):
        found = _known(source if isinstance(source, Exemplars) else _read(path), encoder, source)
        found = _shrink(found, shrinkage)
        found = replace(found, features=found.features if features else None)
        if parts and found.parts is None:
            raise ValueError(f"{source!r} has no statistics of parts: make it with parts=True")
    else:
        listed = _listed(path or source, encoder, column)
        asked = {"features": features, "gaussian": gaussian, "parts": parts}
        with torch.no_grad():
            found = _shrink(_remembered(listed, encoder, batch, cache, device, asked), shrinkage)
    for what in (found.gaussian if gaussian else None, found.parts if parts else None):
        if what is not None and what.count < what.dimension and not found.shrinkage:
            warnings.warn(
                f"{what.count} exemplars embedded in {what.dimension} dimensions by "
                f"{encoder.name!r} give a singular covariance: give more, choose an encoder of "
                "fewer dimensions, or set shrinkage (0.1, say)",
                stacklevel=2,
            )
    return found


def save_exemplars(path: str | Path, exemplars: Exemplars) -> None:
    """Write exemplars, whole or not at all; `load_exemplars` takes the file in their place.

    Statistics are written before shrinkage, so that the file may be loaded with any.

    Raises:
        ValueError: the name does not end in .safetensors, or nothing is left of the covariance
            (shrinkage 1).
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"exemplars are saved as .safetensors, but {path.name!r} came")
    tensors, metadata = {}, {"format": FORMAT, "encoder": exemplars.encoder}
    if exemplars.features is not None:
        tensors["features"] = exemplars.features
    for name in ("gaussian", "parts"):
        gaussian = getattr(exemplars, name)
        if gaussian is not None:
            tensors[f"{name}.mean"] = gaussian.mean
            tensors[f"{name}.covariance"] = _plain(gaussian.covariance, exemplars.shrinkage)
            metadata[f"{name}.count"] = str(gaussian.count)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda unfinished: save_file(tensors, unfinished, metadata))


# --------------------------------------------------------------------------------------------
# Statistics that are known
# --------------------------------------------------------------------------------------------


def _read(path: Path) -> Exemplars:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of exemplars {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as err:
        raise ValueError(f"{path} cannot be read: {err}") from err
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by save_exemplars (or by a later release)")

    def gaussian(name: str) -> Gaussian | None:
        if f"{name}.mean" not in tensors:
            return None
        count = int(metadata[f"{name}.count"])
        return Gaussian(tensors[f"{name}.mean"], tensors[f"{name}.covariance"], count)

    return Exemplars(
        tensors.get("features"), gaussian("gaussian"), metadata["encoder"], gaussian("parts")
    )


def _known(found: Exemplars, encoder: Encoder, source: Any) -> Exemplars:
    if found.encoder != encoder.key:
        what = "these exemplars" if isinstance(source, Exemplars) else str(source)
        raise ValueError(
            f"{what} were embedded by encoder {found.encoder!r}, but {encoder.key!r} came: their "
            "embeddings cannot be compared; choose the same weights and options, or embed the "
            "exemplars anew"
        )
    return found


def _shrink(found: Exemplars, shrinkage: float) -> Exemplars:
    """With this shrinkage in place of its own."""
    if shrinkage == found.shrinkage:
        return found

    def again(gaussian: Gaussian | None) -> Gaussian | None:
        if gaussian is None:
            return None
        covariance = shrunk(_plain(gaussian.covariance, found.shrinkage), shrinkage)
        return Gaussian(gaussian.mean, covariance, gaussian.count)

    return replace(
        found, gaussian=again(found.gaussian), parts=again(found.parts), shrinkage=float(shrinkage)
    )


def _plain(covariance: Float[Tensor, "d d"], shrinkage: float) -> Float[Tensor, "d d"]:
    """Before it was shrunk, which keeps the trace."""
    if shrinkage == 0:
        return covariance
    if shrinkage == 1:
        raise ValueError("nothing is left of a covariance with shrinkage 1; load it with less")
    identity = torch.eye(len(covariance)).to(covariance)
    return (covariance - shrinkage * covariance.diagonal().mean() * identity) / (1 - shrinkage)


# --------------------------------------------------------------------------------------------
# Embedding
# --------------------------------------------------------------------------------------------

_Listed = Samples | tuple[bool, list]
"""Samples; or whether they are strings, and the strings or the paths of files."""

_Batch = tuple[list[int], Samples | list[str], str]  # their numbers, they themselves, their size

_RECENT: WeakKeyDictionary[Encoder, OrderedDict[Hashable, Exemplars]] = WeakKeyDictionary()
_SOURCES = 4  # remembered of each encoder
_SMALL = 2**24  # numbers of embeddings that are remembered although nobody asked for them


def _remembered(
    listed: _Listed,
    encoder: Encoder,
    batch: int,
    cache: str | Path | None,
    device: torch.device | str | None,
    asked: dict[str, bool],
) -> Exemplars:
    """What is asked for, without shrinkage; embedded only if it was not lately."""
    mark = _mark(listed) if isinstance(encoder, Hashable) else None
    key = mark, encoder.key, batch, str(cache), str(device)
    recent = OrderedDict() if mark is None else _RECENT.setdefault(encoder, OrderedDict())
    known = recent.pop(key, Exemplars(None, None, encoder.key))
    if asked["gaussian"] and known.gaussian is None and known.features is not None:
        known = replace(known, gaussian=Moments().update(known.features).gaussian())
    lacking = {name: asked[name] and getattr(known, name) is None for name in asked}
    if any(lacking.values()) or not any(asked.values()):
        source = encoder if cache is None else Cached(encoder, cache)
        found = _embedded(_batches(listed, source, batch, device), source, **lacking)
        new = {name: getattr(found, name) for name in asked if getattr(found, name) is not None}
        known = replace(known, **new)
    recent[key] = known
    while len(recent) > _SOURCES:
        recent.popitem(last=False)
    return replace(known, **{name: None for name in asked if not asked[name]})


def _mark(listed: _Listed) -> bytes | None:
    """By which the same exemplars are known again: samples and strings by content, files by path,
    size and time of change; None if they cannot be."""
    if isinstance(listed, Samples):
        facts: Any = content_hashes(listed)
    elif listed[0]:
        facts = listed[1]
    else:
        try:
            states = [(path, os.stat(path)) for path in listed[1]]
        except OSError:
            return None  # reading it will say what is wrong
        facts = [(os.path.abspath(path), s.st_size, s.st_mtime_ns) for path, s in states]
    return None if facts is None else blake2b(repr(facts).encode()).digest()


def _embedded(
    batches: Iterable[_Batch], encoder: Encoder, features: bool, gaussian: bool, parts: bool
) -> Exemplars:
    """With features that were not asked for, too, if they are few and embedded anyway."""
    whole, pieces = Moments(), Moments()
    kept: list[Tensor] | None = []
    order: list[int] = []
    count, seen = 0, {}

    def of(what: Samples | list[str], size: str, in_parts: bool) -> Tensor:
        found = embed(encoder, what, in_parts).float().cpu()
        first, d = seen.setdefault(in_parts, (size, found.shape[-1]))
        if found.shape[-1] != d:
            raise ValueError(
                f"encoder {encoder.name!r} makes {d} numbers of exemplars of size {first}, but "
                f"{found.shape[-1]} of those of size {size}: bring them to one size, or choose an "
                "option of the encoder which does"
            )
        return found

    for numbers, what, size in batches:
        count += len(what)
        if gaussian or features:
            found = of(what, size, in_parts=False)
            if gaussian:
                whole.update(found)
            if kept is not None and (features or count * found.shape[1] <= _SMALL):
                kept.append(found)
                order += numbers
            else:
                kept = None
        if parts:
            if not isinstance(what, Samples):
                raise ValueError(
                    "texts have no parts: exemplars of parts must be samples themselves"
                )
            pieces.update(of(what, size, in_parts=True).flatten(0, 1))
    if count < 2:
        raise ValueError(f"a distribution needs 2 exemplars or more, but {count} came")
    return Exemplars(
        torch.cat(kept)[torch.tensor(order).argsort()] if kept else None,
        whole.gaussian() if gaussian else None,
        encoder.key,
        pieces.gaussian() if parts else None,
    )


def _listed(source: Any, encoder: Encoder, column: str | None) -> _Listed:
    if isinstance(source, Samples):
        return source
    if encoder.modality is None:
        raise ValueError(
            f"encoder {encoder.name!r} does not say what it takes: give it an attribute modality "
            "('image', say), or the exemplars as Samples"
        )
    if encoder.modality not in (*_READ, *ALPHABETS, "text"):
        raise ValueError(f"exemplars of modality {encoder.modality!r} come as Samples only")
    strings, items = _items(source, encoder.modality, column)
    return strings, list(items)


def _batches(
    listed: _Listed, encoder: Encoder, batch: int, device: torch.device | str | None
) -> Iterator[_Batch]:
    if isinstance(listed, Samples):
        data = listed.data
        shape = _size(data[0]) if isinstance(data, Tensor) and len(listed) else ""
        for rows in torch.arange(len(listed)).split(batch):
            part = listed.take(rows)
            yield rows.tolist(), part if device is None else part.to(device), shape
        return
    (strings, items), modality = listed, encoder.modality
    if strings and modality not in ALPHABETS:
        text = modality == "text"
        for numbers, _, chunk in _by_size(((None, string) for string in items), batch):
            yield numbers, Samples(chunk, "text") if text else chunk, "text"
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    read = _tokens(modality) if strings else _READ[modality][1]

    def fitted(item: Any) -> tuple[Tensor, dict[str, Any]]:
        data, context = read(item)
        one = Samples(data[None], modality, context={k: [v] for k, v in context.items()})
        return encoder.resized(one).data[0], context

    for numbers, (_, context), chunk in _by_size(_opened(items, fitted), batch):
        same = {name: [value] * len(chunk) for name, value in context}
        samples = Samples(torch.stack(chunk), modality, context=same)
        yield numbers, samples.to(device), _size(chunk[0])


def _by_size(items: Iterable[tuple[Any, Any]], batch: int) -> Iterator[tuple[list[int], Any, list]]:
    """(numbers, size, members) of equal size; few wait at a time, however many sizes there are."""
    waiting: dict[Any, tuple[list[int], list]] = {}
    for count, (size, item) in enumerate(items):
        numbers, members = waiting.setdefault(size, ([], []))
        numbers.append(count)
        members.append(item)
        if len(members) == batch or sum(len(m) for _, m in waiting.values()) == 4 * batch:
            full = max(waiting, key=lambda size: len(waiting[size][1]))
            numbers, members = waiting.pop(full)
            yield numbers, full, members
    for size, (numbers, members) in waiting.items():
        yield numbers, size, members


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape[1:] if tensor.ndim > 1 else tensor.shape))


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
_FASTA = tuple(end + gz for end in (".fasta", ".fa", ".faa", ".fna") for gz in ("", ".gz"))
_MANIFESTS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_PATHS = ("path", "image", "audio", "image_path", "audio_path", "file_name", "filename", "file")
_TEXTS = ("text", "prompt", "caption")
_SEQUENCES = ("sequence", "seq")


def _read_image(path: Path) -> tuple[Tensor, dict[str, Any]]:
    with Image.open(path) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError(f"pixels of mode {image.mode!r}; convert it to 8 bits")
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255, {}


def _read_sound(path: Path) -> tuple[Tensor, dict[str, Any]]:
    from diffreward.sounds import read_sound

    waveform, rate = read_sound(path)
    return waveform, {"sampling_rate": rate}


# modality -> endings of its files, and what reads one: its data, and its context
_READ: dict[str, tuple[tuple[str, ...], Callable[[Path], tuple[Tensor, dict[str, Any]]]]] = {
    "image": (_IMAGES, _read_image),
    "audio": ((".wav", ".flac", ".ogg", ".mp3"), _read_sound),
}


def _path(source: Any) -> Path | None:
    if not isinstance(source, str | os.PathLike):
        return None
    if isinstance(source, str) and source.startswith("embedded:"):
        return asset_path(source.removeprefix("embedded:"))
    return Path(source).expanduser()


def _tokens(modality: str) -> Callable[[str], tuple[Tensor, dict[str, Any]]]:
    return lambda sequence: (to_tokens(sequence, modality), {})


def _opened(
    items: Iterable[Any], read: Callable[[Any], tuple[Tensor, dict[str, Any]]]
) -> Iterator[tuple[Any, Tensor]]:
    for item in items:
        try:
            data, context = read(item)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no file {item}, which is among the exemplars"
            ) from None
        except (OSError, ValueError, Image.DecompressionBombError) as err:
            raise ValueError(f"the exemplar {str(item)!r} cannot be read: {err}") from err
        yield (tuple(data.shape), tuple(context.items())), data


def _items(source: Any, modality: str, column: str | None) -> tuple[bool, Iterable[Any]]:
    """Whether they are strings, and the strings or the paths of files."""
    files = modality in _READ
    if not isinstance(source, Path):
        items = list(source)
        paths = [isinstance(item, Path) for item in items]
        if not all(isinstance(item, str | Path) for item in items) or len(set(paths)) > 1:
            raise ValueError(
                "a list of exemplars has texts or sequences only, or pathlib.Path only, but "
                f"{', '.join(sorted({type(item).__name__ for item in items}))} came"
            )
        if any(paths) and not files:
            raise ValueError(f"{modality} exemplars are strings or one file, not a list of files")
        return not any(paths), _checked(items, modality)
    if not source.exists():
        raise FileNotFoundError(f"there is no file or folder of exemplars {source}")
    name = source.name.lower()
    if source.is_dir():
        ends = _READ[modality][0] if files else (".txt",) if modality == "text" else _FASTA
        inside = sorted(p for p in source.rglob("*") if p.name.lower().endswith(ends))
        inside = [p for p in inside if p.is_file() and not p.name.startswith(".")]
        if not inside:
            raise ValueError(f"there is no {modality} below {source}: no {', '.join(ends)}")
        if files:
            return False, inside
        return True, (string for path in inside for string in _strings(path, modality))
    if name.endswith(_MANIFESTS):
        return _manifest(source, modality, column)
    if name.endswith(".txt") or (name.endswith(_FASTA) and modality in ALPHABETS):
        return True, _strings(source, modality)
    raise ValueError(
        f"{source} cannot be read as exemplars for an encoder of {modality}: expected a folder, a "
        f"manifest ({', '.join(_MANIFESTS)}), a .txt file"
        + (", a FASTA file" if modality in ALPHABETS else "")
        + ", or a .safetensors file written by save_exemplars"
    )


def _checked(items: list, modality: str) -> list:
    return read_sequences(items, modality) if items and modality in ALPHABETS else items


def _strings(path: Path, modality: str) -> list[str]:
    if modality in ALPHABETS:
        return read_sequences(path, modality)
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _manifest(path: Path, modality: str, column: str | None) -> tuple[bool, Iterable[Any]]:
    head = next(iter(_rows(path)), None)
    if head is None:
        raise ValueError(f"{path} has no rows")
    known = _SEQUENCES if modality in ALPHABETS else _TEXTS
    if modality in _READ:
        known = (*_PATHS, *known)
    chosen = column or next((name for name in known if name in head), None)
    if chosen not in head:
        raise ValueError(
            f"{path} has no column {repr(column) if column else ' or '.join(map(repr, known))}; "
            f"there are {', '.join(map(repr, head)) or 'none'}. Name one with column="
        )
    files = modality in _READ and chosen not in _TEXTS
    if files and chosen not in _PATHS:  # named by the caller: see what it is
        files = (path.parent / str(head[chosen])).is_file()

    def cells() -> Iterator[Any]:
        for n, row in enumerate(_rows(path), 1):
            cell = row.get(chosen)
            if not isinstance(cell, str) or not cell.strip():
                raise ValueError(f"{path}: row {n} has no {chosen!r}, but {cell!r}")
            yield path.parent / cell if files else cell

    return not files, cells()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    end = path.suffix.lower()
    if end == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for part in file.iter_batches(batch_size=256):
                yield from part.to_pylist()
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        if end in (".csv", ".tsv"):
            yield from csv.DictReader(file, delimiter="\t" if end == ".tsv" else ",")
            return
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as err:
                raise ValueError(f"{path}: line {n} is no JSON: {err}") from err
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {n} is no JSON object")
            yield row
