"""Sequence motifs: files of count matrices, log-odds, p-values, scores along a sequence.

A motif of width w is a matrix of counts ``(w, 4)``, columns in the order ACGT. Its log-odds are
``ln p / background`` in nats (Stormo 2000, DNA binding sites: representation and discovery), and a
word's score is their sum over its letters. The reverse strand is scored by the reversed and
complemented matrix, which in the order ACGT is the matrix flipped along both axes.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards.tokens import missing

UNIFORM = (0.25, 0.25, 0.25, 0.25)
STEP = 0.01
"""Nats: the grid on which p-values of scores are computed."""

_LETTERS = "ACGT"
_JASPAR_ID = re.compile(r"[A-Z]{2}\d{4}(\.\d+)?")
_MEME_SITES = 20.0  # what MEME assumes where a file does not say


@dataclass(frozen=True, eq=False)
class Motif:
    """A position frequency matrix.

    Attributes:
        id: such as ``"MA0139.2"``.
        name: such as ``"CTCF"``.
        counts: float64 ``(w, 4)``, not negative, no row of zeros; columns A, C, G, T.
        background: letter frequencies given with it, if any.
    """

    id: str
    name: str
    counts: Float[Tensor, "w 4"]
    background: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def log_odds(
        self, pseudocount: float | int = 1.0, background: Sequence[float] | None = None
    ) -> Float[Tensor, "w 4"]:
        """``ln p / background`` in nats, float64.

        Args:
            pseudocount: added to each position in all, shared out like the background; above 0,
                or a letter that was never seen would be impossible.
            background: frequencies of A, C, G, T; by default the motif's own, or uniform.

        Raises:
            ValueError: a pseudocount that is not positive, or no background of four positive
                frequencies which sum to 1.
        """
        if not 0 < pseudocount < math.inf:
            raise ValueError(f"pseudocount must be above 0, but {pseudocount} came")
        letters = torch.tensor(self.frequencies(background), dtype=torch.float64)
        total = self.counts.sum(1, keepdim=True)
        return ((self.counts + pseudocount * letters) / (total + pseudocount) / letters).log()

    def frequencies(self, background: Sequence[float] | None = None) -> tuple[float, ...]:
        """The background that is used, checked."""
        chosen = tuple(float(p) for p in (background or self.background or UNIFORM))
        if len(chosen) != 4 or min(chosen) <= 0 or abs(sum(chosen) - 1) > 0.01:
            raise ValueError(
                "a background is four frequencies of A, C, G and T, all above 0, which sum to 1, "
                f"but {chosen} came"
            )
        return tuple(p / sum(chosen) for p in chosen)


# --------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------


def motif_scores(
    x: Float[Tensor, "b l 4"], log_odds: Float[Tensor, "w 4"], both_strands: bool = True
) -> Float[Tensor, "b strands places"]:
    """Score of every window of w letters, ``l - w + 1`` of them, on one or both strands.

    Linear in relaxed tokens: the mean score under independent letters.

    Raises:
        ValueError: the sequences are shorter than the motif.
    """
    width = len(log_odds)
    if x.shape[1] < width:
        raise ValueError(f"the motif has {width} letters, but sequences of {x.shape[1]} came")
    matrices = torch.stack([log_odds, log_odds.flip(0, 1)] if both_strands else [log_odds])
    return F.conv1d(x.transpose(1, 2), matrices.transpose(1, 2).to(x))


def score_threshold(
    log_odds: Float[Tensor, "w 4"], background: Sequence[float], p_value: float | int
) -> float:
    """Lowest score, in nats, which a word of background letters reaches with this probability.

    Exact for the matrix rounded to `STEP` (Staden 1989, Methods for calculating the probabilities
    of finding patterns in sequences), by adding up one position's distribution after the other.
    Where even the best word is likelier than ``p_value``, the best score.

    Raises:
        ValueError: a p-value that is not between 0 and 1.
    """
    if not 0 < p_value < 1:
        raise ValueError(f"a p-value is between 0 and 1, but {p_value} came")
    steps = rounded_steps(log_odds)
    low = steps.min(1)
    law = np.ones(1)
    for row, least in zip(steps, low, strict=True):
        after = np.zeros(len(law) + int(row.max() - least))
        for step, p in zip(row - least, background, strict=True):
            after[step : step + len(law)] += p * law
        law = after
    tail = law[::-1].cumsum()[::-1]  # P(score >= low + n)
    possible = np.flatnonzero(law > 0)
    enough = possible[tail[possible] <= p_value * (1 + 1e-9)]
    best = enough[0] if len(enough) else possible[-1]
    return float((low.sum() + best) * STEP)


def rounded_steps(log_odds: Float[Tensor, "w 4"]) -> np.ndarray:
    """The matrix in units of `STEP`, rounded; int64 ``(w, 4)``."""
    return np.rint(log_odds.double().cpu().numpy() / STEP).astype(np.int64)


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------


def load_motifs(source: str | Path, choose: str | Sequence[str] | None = None) -> list[Motif]:
    """Motifs of a file in JASPAR's or MEME's format, or of a JASPAR matrix id.

    Args:
        source: a file, or an id such as ``"MA0139.2"`` (without a version: the newest), which the
            package pyjaspar looks up in its copy of JASPAR.
        choose: ids or names of some of them, in this order; by default all.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: an id, and pyjaspar is missing.
        ValueError: see `read_motifs`; no motif of that id or name (near matches are listed).
    """
    path = Path(source).expanduser()
    if not path.is_file() and _JASPAR_ID.fullmatch(str(source)):
        motifs = [_from_jaspar(str(source))]
    else:
        motifs = read_motifs(path)
    if choose is None:
        return motifs
    known = {key: motif for motif in reversed(motifs) for key in (motif.name, motif.id) if key}
    wanted = [choose] if isinstance(choose, str) else list(choose)
    for key in wanted:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            raise ValueError(
                f"{source} has no motif {key!r}; "
                + (f"did you mean {', '.join(near)}?" if near else f"it has {_first_of(known)}")
            )
    return [known[key] for key in wanted]


def _first_of(known: dict[str, Motif]) -> str:
    ids = sorted({motif.id or motif.name for motif in known.values()})
    return ", ".join(ids[:10]) + (", ..." if len(ids) > 10 else "")


def _from_jaspar(identifier: str) -> Motif:
    try:
        from pyjaspar import jaspardb
    except ImportError as err:
        raise missing("motif", "pyjaspar for a JASPAR matrix id", err, "jaspar") from err
    found = jaspardb().fetch_motif_by_id(identifier)
    if found is None:
        raise ValueError(f"JASPAR has no matrix {identifier!r}")
    counts = torch.tensor([list(found.counts[letter]) for letter in _LETTERS], dtype=torch.float64)
    return Motif(found.matrix_id, found.name, counts.T.contiguous())


def read_motifs(path: str | Path) -> list[Motif]:
    """All motifs of a file in JASPAR's format (.jaspar, .pfm) or MEME's; which, its text tells.

    JASPAR: a line ``>ID NAME``, then four rows of counts, ``A [ 1 2 3 ]`` or in the order A, C, G,
    T; the first line may be missing from a file of one motif. MEME (minimal or full): its
    probabilities become counts by the number of sites, 20 where there is none. U is T.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no motif in it, a negative count or something that is no number, an alphabet
            other than that of DNA or RNA, rows of different lengths, probabilities which do not
            sum to 1, a position without counts; the message names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no motif file {str(path)!r}, and it is no matrix id such as MA0139.2"
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    first = next((line for line in lines if line), "")
    motifs = list((_meme if first.startswith("MEME version") else _jaspar)(path, lines))
    if not motifs:
        raise ValueError(f"{path} has no motif in it")
    return motifs


def _fail(path: Path, n: int, problem: str) -> ValueError:
    return ValueError(f"{path}, line {n}: {problem}")


def _numbers(path: Path, n: int, text: str) -> list[float]:
    values = []
    for word in text.split():
        try:
            value = float(word)
        except ValueError:
            raise _fail(path, n, f"{word!r} is no number") from None
        if not 0 <= value < math.inf:
            what = "negative: these are log-odds, not counts" if value < 0 else "no count"
            raise _fail(path, n, f"{word} is {what}")
        values.append(value)
    return values


def _jaspar(path: Path, lines: list[str]) -> Iterator[Motif]:
    blocks: list[tuple[int, list[str], list[tuple[int, str]]]] = []  # line, title, numbered rows
    for n, line in enumerate(lines, 1):
        if line.startswith(">"):
            blocks.append((n, line[1:].split(), []))
        elif line:
            if not blocks:
                blocks.append((n, [], []))
            blocks[-1][2].append((n, line))
    for at, title, rows in blocks:
        identifier, *name = title or [path.stem]
        yield Motif(identifier, " ".join(name), _jaspar_counts(path, at, rows))


def _jaspar_counts(path: Path, at: int, lines: list[tuple[int, str]]) -> Tensor:
    rows: dict[str, list[float]] = {}
    for n, line in lines:
        match = re.fullmatch(r"(?:([A-Za-z])(?=[\s|:\[])\s*[|:]?)?\s*\[?([^\[\]]*)\]?", line)
        if match is None:
            raise _fail(path, n, f"{line!r} is no row of a matrix, such as 'A [ 1 2 3 ]'")
        if len(rows) == 4:
            raise _fail(path, n, "a fifth row: a matrix has four, A, C, G, T; is it transposed?")
        letter = (match[1] or _LETTERS[len(rows)]).upper().replace("U", "T")
        if letter not in _LETTERS or letter in rows:
            what = "a second row" if letter in rows else "a row"
            raise _fail(path, n, f"{what} {letter!r}: a matrix has one for each of A, C, G, T")
        rows[letter] = _numbers(path, n, match[2])
        width = len(next(iter(rows.values())))
        if len(rows[letter]) != width:
            raise _fail(
                path, n, f"row {letter!r} has {len(rows[letter])} counts, the first row {width}"
            )
    absent = [letter for letter in _LETTERS if not rows.get(letter)]
    if absent:
        raise _fail(path, at, f"a motif without counts of {', '.join(absent)}")
    counts = torch.tensor([rows[letter] for letter in _LETTERS], dtype=torch.float64).T
    empty = (counts.sum(1) == 0).nonzero()
    if len(empty):
        raise _fail(path, at, f"position {int(empty[0]) + 1} of the motif has no counts")
    return counts.contiguous()


def _meme(path: Path, lines: list[str]) -> Iterator[Motif]:
    background, title, at, n = None, None, 0, 0
    while n < len(lines):
        line = lines[n]
        n += 1
        if line.startswith("ALPHABET"):
            letters = line.partition("=")[2].strip().upper().replace("U", "T")
            if letters != _LETTERS:
                raise _fail(path, n, f"{line!r}: the alphabet must be ACGT or ACGU")
        elif line.startswith("Background letter frequencies"):
            words: list[str] = []
            while n < len(lines) and re.match(r"[A-Za-z]\s+[\d.]", lines[n]):
                words += lines[n].split()
                n += 1
            if [w.upper().replace("U", "T") for w in words[::2]] != list(_LETTERS):
                raise _fail(path, n, f"the background is of {words[::2]}, not of A, C, G, T")
            background = tuple(_numbers(path, n, " ".join(words[1::2])))
        elif line.startswith("MOTIF"):
            if title is not None:
                raise _fail(path, at, f"motif {' '.join(title)!r} has no letter-probability matrix")
            title, at = line.split()[1:] or ["motif"], n
        elif line.startswith("letter-probability matrix"):
            given = dict(re.findall(r"(\w+)\s*=\s*([\d.eE+-]+)", line))
            if int(given.get("alength", 4)) != 4:
                raise _fail(path, n, f"alength is {given['alength']}, and must be 4 (ACGT)")
            sites = float(given.get("nsites", 0)) or _MEME_SITES
            rows = []
            while n < len(lines) and re.match(r"[-\d.]", lines[n]) and lines[n].strip("-"):
                row = _numbers(path, n + 1, lines[n])
                if len(row) != 4:
                    raise _fail(path, n + 1, f"{len(row)} probabilities came, expected 4 (ACGT)")
                if abs(sum(row) - 1) > 0.01:
                    raise _fail(path, n + 1, f"the probabilities sum to {sum(row):g}, not to 1")
                rows.append([sites * p for p in row])
                n += 1
            if len(rows) != int(given.get("w", len(rows))) or not rows:
                raise _fail(path, n, f"{len(rows)} rows came, expected w= {given.get('w', '1 up')}")
            identifier, *name = title or [path.stem]
            counts = torch.tensor(rows, dtype=torch.float64)
            yield Motif(identifier, " ".join(name), counts, background)
            title = None
    if title is not None:
        raise _fail(path, at, f"motif {' '.join(title)!r} has no letter-probability matrix")
