"""What is to be scored: folders, globs, manifests, tars, data sets and sequence files, as a stream.

`Inputs` names them and lists them, one `Item` a row, always in the same order: arguments as they
were given, a folder sorted by name, everything else as it is in its file. Nothing is opened here
but what has to be listed; `diffreward.scoring.decode` opens the rest in worker processes.

    folder                    every image below it; ``x.txt`` beside ``x.png`` is its prompt
    glob                      what it matches, sorted
    .csv .tsv .jsonl .parquet a manifest: paths (relative to it) or image bytes, prompts, anything
    .tar .tar.gz .tgz         WebDataset: images with their .txt or .json
    folder of a data set      what Hugging Face's ``save_to_disk`` writes
    .fasta .fa .faa .fna      sequences
    .txt                      texts, one a line (for rewards of text)
    embedded:NAME             one of the package's own
    anything else             one image

What cannot be listed (a line that is no JSON, a folder that may not be read) is an `Item` with an
error: one input, one row, whatever happens.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffreward._assets import asset_path

IMAGES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .ico"
    " .tga".split()
)
MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
TARS = (".tar", ".tar.gz", ".tgz")
FASTA = tuple(end + gz for end in (".fasta", ".fa", ".faa", ".fna") for gz in ("", ".gz"))

DATA_COLUMNS = {
    "image": ("path", "image", "image_path", "file_name", "filename", "file", "img", "png", "jpg"),
    "text": ("text", "completion", "response"),
    "sequence": ("sequence", "seq"),
}
PROMPT_COLUMNS = ("prompt", "caption", "text")

# what reading a file may raise, whatever is in it
UNREADABLE = (OSError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException)

_PEEK = 64  # rows of an input that are looked at before anything is computed


@dataclass(frozen=True)
class Item:
    """One row of the result, before it is scored.

    Attributes:
        id: what it is called in the result: a path, a member of a tar, a line of a manifest.
        file: the file to open; None: ``data`` is all there is.
        span: offset and length within ``file``, for a member of a tar.
        data: encoded image, text or sequence.
        prompt: what was asked for.
        extra: the other columns of a manifest.
        error: why this cannot be scored, if that is known already.
        stamp: size and time of change of ``file``: another stamp is another input.
    """

    id: str
    file: str | None = None
    span: tuple[int, int] | None = None
    data: bytes | str | None = None
    prompt: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    stamp: tuple[int, int] | None = None

    def key(self, context: Sequence[str] = ()) -> bytes:
        """16 bytes that name what is scored: the same data, prompt and context, the same key."""
        facts = (
            None if self.file is None else os.fsencode(os.path.abspath(self.file)),
            self.span, self.stamp, self.prompt, [self.extra.get(name) for name in context],
            self.error and (self.id, self.error), type(self.data).__name__,
        )  # fmt: skip
        digest = blake2b(repr(facts).encode(errors="surrogatepass"), digest_size=16)
        if self.data is not None:
            text = isinstance(self.data, str)
            digest.update(self.data.encode(errors="surrogatepass") if text else self.data)
        return digest.digest()


class Inputs:
    """Everything that is to be scored; iterating over it lists it anew, in the same order.

    Args:
        paths: see the module docstring.
        kind: what the rewards score: ``"image"``, ``"text"`` or ``"sequence"``.
        data_column, prompt_column: of manifests and data sets; None: the first that is there of
            `DATA_COLUMNS` and `PROMPT_COLUMNS`.
        prompts: one for all, or one a row; None: those that come with the inputs.

    Raises:
        FileNotFoundError: a path that is not there, or a glob that matches nothing.
        ValueError: there is nothing to score, a manifest without the column, an input of another
            kind, or not one prompt for each row.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        kind: str = "image",
        *,
        data_column: str | None = None,
        prompt_column: str | None = None,
        prompts: str | Sequence[str] | None = None,
    ) -> None:
        self.kind, self.prompts = kind, prompts
        self._columns = data_column, prompt_column
        self._readers: list[tuple[str, Callable[[], Iterator[Item]]]] = []
        for path in expand(paths):
            self._readers.append((path, self._reader(path)))
        if not any([self._peek(path, reader) for path, reader in self._readers]):
            given = ", ".join(map(str, paths)) or "nothing"
            raise ValueError(f"there is nothing to score in {given}: {_EXPECTED[kind]}")
        if prompts is not None and not isinstance(prompts, str):
            rows = sum(1 for _ in self._listed())
            if rows != len(prompts):
                raise ValueError(
                    f"{len(prompts)} prompts came for {rows} inputs; give one prompt for each, in "
                    "the order of the inputs, or one for all"
                )

    def __iter__(self) -> Iterator[Item]:
        for n, item in enumerate(self._listed()):
            prompt = item.prompt
            if self.prompts is not None:
                prompt = self.prompts if isinstance(self.prompts, str) else self.prompts[n]
            if prompt is not None:
                prompt = clean(prompt)
            yield item if prompt == item.prompt else replace(item, prompt=prompt)

    def first(self, count: int) -> list[Item]:
        """The first items."""
        return list(islice(self, count))

    def require_prompts(self, who: str) -> None:
        """Refuse an input of which none of the first rows has a prompt.

        Raises:
            ValueError: there is one; the message says where its prompts would be looked for.
        """
        if self.prompts is not None:
            return
        for path, reader in self._readers:
            rows = [item for item in self._peek(path, reader) if item.error is None]
            if rows and all(item.prompt is None for item in rows):
                raise ValueError(
                    f"{who} compares samples with their prompts, but {path} has none: "
                    f"{self._where_prompts(path)}, or give prompts"
                )

    def _where_prompts(self, path: str) -> str:
        end = path.lower()
        if os.path.isdir(path) and not _is_dataset(path):
            return "write the prompt of x.png to x.txt beside it, list the files in a manifest"
        if end.endswith(TARS):
            return "a .txt or .json (with 'prompt') beside each image is read"
        if end.endswith(MANIFESTS) or _is_dataset(path):
            wanted = self._columns[1] or " or ".join(map(repr, self._prompt_columns()))
            return f"expected a column {wanted}; name another with prompt_column"
        return "list it in a manifest with a column 'prompt'"

    def _listed(self) -> Iterator[Item]:
        for path, reader in self._readers:
            yield from _whatever_happens(path, reader)

    @staticmethod
    def _peek(path: str, reader: Callable[[], Iterator[Item]]) -> list[Item]:
        rows = _whatever_happens(path, reader)
        found = list(islice(rows, _PEEK))
        rows.close()  # thousands of inputs must not be thousands of open files
        return found

    def _reader(self, path: str) -> Callable[[], Iterator[Item]]:
        """The function that lists this path."""
        end = path.lower()
        if os.path.isdir(path):
            if _is_dataset(path):
                rows = partial(_dataset_rows, path)
                return partial(self._manifest, path, rows, path)
            return partial(_folder, path, *_FOLDER[self.kind])
        if end.endswith(MANIFESTS):
            rows = partial(_MANIFEST_ROWS[os.path.splitext(end)[1]], path)
            return partial(self._manifest, path, rows, os.path.dirname(path))
        if end.endswith(TARS) and self.kind == "image":
            return partial(_tar, path, self._columns[1])
        if end.endswith(FASTA) and self.kind != "image":
            return partial(_fasta, path)
        if end.endswith(".txt") and self.kind != "image":
            return partial(_lines, path)
        if end.endswith((*FASTA, ".txt", *TARS)) or self.kind != "image":
            raise ValueError(f"{path} cannot be scored by these rewards: {_EXPECTED[self.kind]}")
        return partial(_one, path)

    def _prompt_columns(self) -> tuple[str, ...]:
        return tuple(name for name in PROMPT_COLUMNS if name not in DATA_COLUMNS[self.kind])

    def _manifest(
        self, path: str, rows: Callable[[], Iterator[dict | Exception]], folder: str
    ) -> Iterator[Item]:
        data_column, prompt_column = self._columns
        data_columns = (data_column,) if data_column else DATA_COLUMNS[self.kind]
        prompt_columns = (prompt_column,) if prompt_column else self._prompt_columns()
        seen_columns = False
        for n, row in enumerate(rows(), 1):
            name = f"{path}:{n}"
            if not isinstance(row, dict):
                yield Item(name, error=_reason(row))
                continue
            column = next((c for c in data_columns if c in row), None)
            if column is None:
                wanted = " or ".join(map(repr, data_columns))
                message = f"no column {wanted} among {', '.join(map(repr, row)) or 'none'}"
                if not seen_columns:  # not a bad row: the manifest is of another kind
                    raise ValueError(
                        f"{path}: {message}; name the one with the {self.kind} with data_column"
                    )
                yield Item(name, error=message)
                continue
            seen_columns = True
            prompted = next((c for c in prompt_columns if c in row and c != column), None)
            own = row.get("id") if column != "id" else None
            extra = {
                key: value
                for key, value in row.items()
                if key not in (column, prompted, "id") and not _has_bytes(value)
            }
            prompt = None if prompted is None or row[prompted] is None else str(row[prompted])
            made = self._item(name, row[column], folder)
            yield Item(
                made.id if own in (None, "") else str(own), made.file, None, made.data, prompt,
                extra, made.error, made.stamp,
            )  # fmt: skip

    def _item(self, name: str, value: Any, folder: str) -> Item:
        """An item from a manifest's cell: a path, bytes, or both as data sets have them."""
        if isinstance(value, Mapping) and {"bytes", "path"} >= value.keys():
            value = value.get("bytes") or value.get("path")
        if value is None or value == "":
            return Item(name, error="the cell is empty")
        if self.kind != "image":
            return Item(name, data=str(value))
        if isinstance(value, bytes):
            return Item(name, data=value)
        if not isinstance(value, str):
            return Item(name, error=f"expected a path or bytes, but {type(value).__name__} came")
        if "://" in value:
            return Item(value, error="a URL: download it and give the file")
        file = os.path.join(folder, value)
        return Item(file, file, stamp=_stamp(file))


_EXPECTED = {
    "image": "expected folders, globs, images, .csv, .tsv, .jsonl or .parquet manifests, .tar "
    "shards, or data sets saved to disk",
    "text": "expected .txt files (one text a line), .fasta, or .csv, .tsv, .jsonl or .parquet "
    "manifests with a column 'text'",
    "sequence": "expected .fasta or .txt files (one sequence a line), or .csv, .tsv, .jsonl or "
    ".parquet manifests with a column 'sequence'",
}


def expand(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Paths as they are, with ``embedded:`` resolved and globs replaced by what they match.

    Raises:
        FileNotFoundError: a path that is not there, or a glob that matches nothing.
    """
    found = []
    for given in map(os.fspath, paths):
        if given.startswith("embedded:"):
            found.append(str(asset_path(given.removeprefix("embedded:"))))
        elif os.path.lexists(given):
            found.append(given)
        elif glob.has_magic(given):
            matches = sorted(glob.iglob(given, recursive=True))
            if "**" in given:  # its folders' files are among the matches
                matches = [path for path in matches if not os.path.isdir(path)]
            if not matches:
                raise FileNotFoundError(f"{given} matches nothing")
            found += matches
        else:
            raise FileNotFoundError(f"{given} does not exist; expected a file, a folder or a glob")
    return found


# --------------------------------------------------------------------------------------------
# Files and folders
# --------------------------------------------------------------------------------------------


def _stamp(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    return found.st_size, found.st_mtime_ns


def _one(path: str) -> Iterator[Item]:
    yield Item(path, path, stamp=_stamp(path))


def _folder(
    path: str,
    ends: Collection[str],
    read: Callable[[str, Mapping[str, str]], Iterator[Item]],
    seen: set[tuple[int, int]] | None = None,
) -> Iterator[Item]:
    """Every file below a folder, sorted by name; a folder reached twice by links is read once."""
    seen = set() if seen is None else seen
    try:
        found = os.stat(path)
        if (found.st_dev, found.st_ino) in seen:
            return
        seen.add((found.st_dev, found.st_ino))
        with os.scandir(path) as entries:  # of a million entries, only names are kept
            names = {entry.name: kind for entry in entries if (kind := _kind(entry, ends))}
    except OSError as err:
        yield Item(path, error=f"the folder cannot be listed: {_reason(err)}")
        return
    for name in sorted(names):
        inner = os.path.join(path, name)
        if names[name] == "folder":
            yield from _folder(inner, ends, read, seen)
        elif names[name] == "file":
            yield from _whatever_happens(inner, partial(read, inner, names))


def _kind(entry: os.DirEntry, ends: Collection[str]) -> str:
    """``"folder"``, ``"file"``, ``"beside"`` (a possible prompt), or nothing of interest."""
    end = os.path.splitext(entry.name)[1].lower()
    try:
        if entry.is_dir():
            return "folder"
        if end in ends and (entry.is_file() or entry.is_symlink()):  # a broken link is a row
            return "file"
    except OSError:  # a link to itself
        return "file" if end in ends else ""
    return "beside" if end == ".txt" else ""


def _image(file: str, names: Mapping[str, str]) -> Iterator[Item]:
    beside = os.path.splitext(file)[0] + ".txt"
    prompt, error = None, None
    if os.path.basename(beside) in names:
        try:
            prompt = Path(beside).read_text(encoding="utf-8", errors="surrogateescape").strip()
        except OSError as err:
            error = f"its prompt cannot be read: {_reason(err)}"
    yield Item(file, file, prompt=prompt, error=error, stamp=_stamp(file))


def _lines(path: str, names: Collection[str] = ()) -> Iterator[Item]:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                yield Item(f"{path}:{n}", data=line.rstrip("\r\n"))


def _fasta(path: str, names: Collection[str] = ()) -> Iterator[Item]:
    """One sequence after each ``>``; its id is the first word there."""
    opened = gzip.open if path.lower().endswith(".gz") else open
    name, parts, n = None, [], 0

    def item() -> Item:
        data = "".join(parts)
        if name is None:
            return Item(f"{path}:1", error="a sequence without a '>' line before it")
        return Item(name, data=data) if data else Item(name, error="the sequence is empty")

    with opened(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            line = line.strip()
            if line.startswith(">"):
                if name is not None or parts:
                    yield item()
                n += 1
                name, parts = (line[1:].split() or [f"{path}:{n}"])[0], []
            elif line:
                parts.append(line)
    if name is not None or parts:
        yield item()


# what a folder is searched for, and what reads it
_FOLDER = {
    "image": (IMAGES, _image),
    "text": (frozenset({".txt"}), _lines),
    "sequence": (FASTA, _fasta),
}


# --------------------------------------------------------------------------------------------
# Manifests and data sets: rows as mappings, or the exception that came instead
# --------------------------------------------------------------------------------------------


def _csv_rows(path: str, delimiter: str = ",") -> Iterator[dict | Exception]:
    csv.field_size_limit(2**31 - 1)
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file, delimiter=delimiter, restkey="")
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as err:
                yield err
                continue
            if row.pop("", None):
                yield ValueError("more cells than the header has columns")
            else:
                yield {name: value or None for name, value in row.items()}


def _jsonl_rows(path: str) -> Iterator[dict | Exception]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as err:
                yield ValueError(f"no JSON: {err}")
                continue
            yield row if isinstance(row, dict) else ValueError("expected a JSON object")


def _parquet_rows(path: str) -> Iterator[dict]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _is_dataset(path: str) -> bool:
    return any(
        os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")
    )


def _dataset_rows(path: str) -> Iterator[dict]:
    """Rows of what Hugging Face's ``save_to_disk`` writes; all splits of a dictionary, in order."""
    together = Path(path, "dataset_dict.json")
    if together.is_file():
        for split in json.loads(together.read_text(encoding="utf-8"))["splits"]:
            yield from _dataset_rows(os.path.join(path, split))
        return
    state = json.loads(Path(path, "state.json").read_text(encoding="utf-8"))
    for part in state["_data_files"]:
        with pa.memory_map(os.path.join(path, part["filename"])) as file:
            for batch in pa.ipc.open_stream(file):
                for start in range(0, batch.num_rows, 64):
                    yield from batch.slice(start, 64).to_pylist()


_MANIFEST_ROWS = {
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".parquet": _parquet_rows,
}


# --------------------------------------------------------------------------------------------
# WebDataset
# --------------------------------------------------------------------------------------------


def _tar(path: str, prompt_column: str | None) -> Iterator[Item]:
    """Images of a tar, each with what else has its name up to the first dot and is next to it."""
    packed = path.lower().endswith("gz")
    stamp = _stamp(path)
    group, images, beside = None, [], {}
    try:
        with tarfile.open(path, "r:gz" if packed else "r:") as tar:
            for member in tar:
                tar.members = []  # a shard may have millions
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, end = name.partition(".")
                if (folder, stem) != group:
                    yield from _sample(images, beside, prompt_column)
                    group, images, beside = (folder, stem), [], {}
                end = "." + end.lower()
                if os.path.splitext(name)[1].lower() in IMAGES:
                    where = f"{path}/{member.name}"
                    if packed:
                        images.append(Item(where, data=tar.extractfile(member).read()))
                    else:
                        span = (member.offset_data, member.size)
                        images.append(Item(where, path, span, stamp=stamp))
                elif end in (".txt", ".json") and member.size < 2**24:
                    beside[end] = tar.extractfile(member).read()
    except UNREADABLE as err:
        broken = Item(path, error=f"the rest cannot be read: {_reason(err)}")
    else:
        broken = None
    yield from _sample(images, beside, prompt_column)
    if broken:
        yield broken


def _sample(
    images: list[Item], beside: dict[str, bytes], prompt_column: str | None
) -> Iterator[Item]:
    prompt, extra, error = None, {}, None
    if ".json" in beside:
        try:
            extra = json.loads(beside[".json"])
            if not isinstance(extra, dict):
                raise ValueError("expected an object")
        except (ValueError, RecursionError) as err:
            extra, error = {}, f"its .json cannot be read: {_reason(err)}"
        columns = (prompt_column,) if prompt_column else PROMPT_COLUMNS
        column = next((name for name in columns if extra.get(name) is not None), None)
        prompt = None if column is None else str(extra.pop(column))
    if prompt is None and ".txt" in beside:
        prompt = beside[".txt"].decode("utf-8", errors="surrogateescape").strip()
    for image in images:
        yield Item(image.id, image.file, image.span, image.data, prompt, extra, error, image.stamp)


# --------------------------------------------------------------------------------------------


def _whatever_happens(path: str, reader: Callable[[], Iterator[Item]]) -> Iterator[Item]:
    """What a reader lists; where it cannot go on, a row that says why."""
    try:
        yield from reader()
    except UNREADABLE as err:
        yield Item(path, error=f"the rest cannot be read: {_reason(err)}")


def clean(text: str) -> str:
    """Text that can be written: bytes that are no UTF-8, kept in file names, become escapes."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def _has_bytes(value: Any) -> bool:
    return isinstance(value, bytes) or (
        isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)
    )


def _reason(err: Exception) -> str:
    """What went wrong, in words that do not change from run to run."""
    text = (getattr(err, "strerror", None) or " ".join(str(err).split())) or type(err).__name__
    return text if isinstance(err, OSError | ValueError) else f"{type(err).__name__}: {text}"
