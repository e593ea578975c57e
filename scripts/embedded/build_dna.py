"""Build the data of the embedded DNA models: windows of a bacterial genome, and what they are.

    apt-get download bowtie-examples && dpkg-deb -x bowtie-examples_*.deb deb
    python -m scripts.embedded.build_dna \\
        deb/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz DATA

Seconds on one core of an AMD EPYC. The genome is E. coli 536 (NC_008253, 4.9 million base
pairs), its genes are called by Prodigal's method (``pyrodigal``, GPL, needed here only: the extra
``embedded``). Windows are 200 bp long and read along the strand of their gene:

- *upstream*: up to the first base of a gene, at least 100 bp of which lie between genes, as
  promoters do;
- *coding*: within a gene, 50 bp or more from its ends.

The genome is cut in the middle into halves a and b, and of every ten blocks of 20 kb one is held
out; a window lies wholly within one half, and within held-out blocks or outside of them. Windows
with a repeat (a 31-mer that occurs elsewhere in the genome, on either strand) are left out of all
of these, so that no window has a copy on the other side.

Written: ``DATA/dna.npz`` with

    genome    (n,) uint8, tokens 0..3 of ACGT
    role      (n,) uint8, 0 and 1: training, half a and b; 2 and 3: held out, half a and b
    repeat    (n,) bool, the 31-mer that starts here occurs elsewhere
    upstream  (u, 2) int64, coding (c, 2) int64: first position on the forward strand, strand +-1
    held_out  (h,) int64: first positions of windows of held-out blocks, not overlapping

and ``DATA/natural_upstream.fasta``, the upstream windows themselves, which the package ships.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

WINDOW = 200
INTERGENIC = 100  # bp of an upstream window that must lie outside of all genes
MARGIN = 50  # bp of a gene at either end that no coding window touches
STRIDE = 17  # between coding windows: prime to 3, so that all frames occur
JITTER = 15  # bp by which training may shift an upstream window
BLOCK, HELD_OUT = 20_000, 10  # one of HELD_OUT blocks of BLOCK bp is held out
REPEAT = 31  # at most 31: a k-mer is one int64
LETTERS = "ACGT"


def read_fasta(path: Path) -> tuple[str, np.ndarray]:
    """(name, (n,) uint8 tokens) of the one sequence of a FASTA file, gzipped or not.

    Raises:
        ValueError: not exactly one sequence, or other letters than ACGT.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        lines = file.read().split("\n")
    headers = [line for line in lines if line.startswith(">")]
    if len(headers) != 1 or not lines[0].startswith(">"):
        raise ValueError(f"{path} has {len(headers)} sequences; one complete genome is expected")
    text = "".join(line.strip() for line in lines[1:]).upper()
    code = np.full(256, 255, np.uint8)
    code[list(LETTERS.encode())] = range(4)
    tokens = code[np.frombuffer(text.encode(), np.uint8)]
    if (tokens > 3).any():
        at = int((tokens > 3).argmax())
        raise ValueError(f"letter {at + 1} of {path} is {text[at]!r}; only {LETTERS} are expected")
    words = headers[0][1:].split()[0].split("|")  # NCBI's old form: gi|110640213|ref|NC_008253.1|
    return words[words.index("ref") + 1] if "ref" in words else words[0], tokens


def call_genes(genome: np.ndarray) -> np.ndarray:
    """(g, 3) int64: first position, end (exclusive), strand +-1 of every complete gene, in order.

    Raises:
        ImportError: pyrodigal is not installed.
    """
    import pyrodigal

    text = "".join(np.array(list(LETTERS))[genome])
    finder = pyrodigal.GeneFinder()
    finder.train(text)
    genes = [
        (gene.begin - 1, gene.end, gene.strand)
        for gene in finder.find_genes(text)
        if not (gene.partial_begin or gene.partial_end)
    ]
    return np.array(sorted(genes))


def repeats(genome: np.ndarray, k: int = REPEAT) -> np.ndarray:
    """(n,) bool: does the k-mer that starts here occur elsewhere, on either strand?"""
    n = len(genome) - k + 1
    forward, backward = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for i in range(k):
        letter = genome[i : i + n].astype(np.int64)
        forward = forward * 4 + letter
        backward += (3 - letter) << (2 * i)
    _, inverse, counts = np.unique(
        np.minimum(forward, backward), return_inverse=True, return_counts=True
    )
    found = np.zeros(len(genome), bool)
    found[:n] = counts[inverse] > 1
    return found


def roles(n: int, block: int = BLOCK) -> np.ndarray:
    """(n,) uint8: half (0 or 1) + 2 if held out."""
    position = np.arange(n)
    half = position >= n // 2
    held_out = position // block % HELD_OUT == HELD_OUT // 2
    return (half + 2 * held_out).astype(np.uint8)


class Where:
    """Which windows [first, end) are allowed: of one role, and without a repeat."""

    def __init__(self, role: np.ndarray, repeat: np.ndarray):
        self.n = len(role)
        self.changes = np.concatenate([[0], np.cumsum(role[1:] != role[:-1])])
        self.repeats = np.concatenate([[0], np.cumsum(repeat)])

    def __call__(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        inside = (first >= 0) & (end <= self.n)
        first, end = np.where(inside, first, 0), np.where(inside, end, REPEAT)
        one_role = self.changes[first] == self.changes[end - 1]
        # a k-mer that starts within the last k - 1 positions is not wholly inside
        last = np.maximum(end - REPEAT + 1, first)
        return inside & one_role & (self.repeats[first] == self.repeats[last])


def upstream_windows(genes: np.ndarray, where: Where) -> np.ndarray:
    """(u, 2) int64: first position and strand of the windows that end where a gene starts."""
    taken = np.zeros(where.n + 1, np.int64)
    for first, end, _ in genes:
        taken[first:end] = 1
    taken = np.concatenate([[0], np.cumsum(taken)])
    rows = []
    for gene_first, gene_end, strand in genes:
        first = gene_first - WINDOW if strand > 0 else gene_end
        if first < 0 or first + WINDOW > where.n:
            continue
        # the part next to the gene must be free of genes, the rest may reach into a neighbour
        free = first + WINDOW - INTERGENIC if strand > 0 else first
        if taken[free + INTERGENIC] == taken[free]:
            rows.append((first, strand))
    rows = np.array(rows, np.int64).reshape(-1, 2)
    return rows[where(rows[:, 0] - JITTER, rows[:, 0] + WINDOW + JITTER)]


def coding_windows(genes: np.ndarray, where: Where) -> np.ndarray:
    """(c, 2) int64: first position and strand of windows within genes, STRIDE apart."""
    parts = [np.zeros((0, 2), np.int64)]
    for gene_first, gene_end, strand in genes:
        first = np.arange(gene_first + MARGIN, gene_end - MARGIN - WINDOW + 1, STRIDE)
        parts.append(np.stack([first, np.full_like(first, strand)], 1))
    rows = np.concatenate(parts)
    return rows[where(rows[:, 0], rows[:, 0] + WINDOW)]


def held_out_windows(role: np.ndarray, where: Where) -> np.ndarray:
    """(h,) int64: first positions of neighbouring, not overlapping windows of held-out blocks."""
    first = np.arange(0, len(role) - WINDOW + 1, WINDOW)
    return first[(role[first] >= 2) & where(first, first + WINDOW)]


def windows(genome: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(b, WINDOW) uint8 tokens of windows ``(b, 2)``, each read along its strand."""
    tokens = genome[rows[:, :1] + np.arange(WINDOW)]
    return np.where(rows[:, 1:] > 0, tokens, 3 - tokens[:, ::-1])


def build(genome: np.ndarray, genes: np.ndarray, block: int = BLOCK) -> dict[str, np.ndarray]:
    """What ``dna.npz`` holds; see the module."""
    role, repeat = roles(len(genome), block), repeats(genome)
    where = Where(role, repeat)
    return {
        "genome": genome,
        "role": role,
        "repeat": repeat,
        "upstream": upstream_windows(genes, where),
        "coding": coding_windows(genes, where),
        "held_out": held_out_windows(role, where),
    }


def write_fasta(data: dict[str, np.ndarray], name: str, path: Path) -> None:
    """Every upstream window with where it comes from, in the notation of NCBI (1-based, closed)."""
    rows, lines = data["upstream"], []
    for (first, strand), tokens in zip(rows, windows(data["genome"], rows), strict=True):
        role = data["role"][first]
        ends = (first + 1, first + WINDOW)
        place = f"{ends[0]}-{ends[1]}" if strand > 0 else f"c{ends[1]}-{ends[0]}"
        extra = " held_out" if role >= 2 else ""
        lines.append(f">{name}:{place} half={'ab'[role % 2]}{extra}")
        lines.append("".join(LETTERS[k] for k in tokens))
    path.write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("genome", type=Path, help="FASTA, gzipped or not, of one sequence")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tiny", action="store_true", help="blocks of 600 bp, for tests")
    args = parser.parse_args(argv)
    name, genome = read_fasta(args.genome)
    genes = call_genes(genome)
    data = build(genome, genes, 600 if args.tiny else BLOCK)
    args.data.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.data / "dna.npz", **data)
    write_fasta(data, name, args.data / "natural_upstream.fasta")
    role = data["role"]
    print(f"{name}: {len(genome)} bp, {len(genes)} genes, {data['repeat'].mean():.2%} repeats")
    for k, what in enumerate(("a", "b", "a, held out", "b, held out")):
        count = [int((role[data[n][:, 0]] == k).sum()) for n in ("upstream", "coding")]
        print(f"half {what}: {count[0]} upstream, {count[1]} coding windows")
    print(f"held out: {len(data['held_out'])} windows")


if __name__ == "__main__":
    main()
