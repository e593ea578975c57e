"""Protein backbones, read from PDB and mmCIF files with gemmi (the extra ``bio``)."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffreward.samples import ALPHABETS, to_tokens

BACKBONE = ("N", "CA", "C", "O")
CAPS = ("ACE", "FOR", "NH2", "NME")  # of chain ends; no residues

_ITEM = re.compile(r"([^\s:]+)(?::(-?\d+[A-Za-z]?)(?:-(-?\d+[A-Za-z]?))?)?")


@dataclass
class Structure:
    """The backbone of l residues, in one or more chains.

    Attributes:
        name: for messages; the file it was read from.
        coordinates: ``(l, 4, 3)`` of N, CA, C and O, in angstroms.
        sequence: l native letters.
        chains: the chain of each residue, by the author's name.
        numbers: the author's number of each residue, with insertion code ("52", "52A").
        index: ``(l,)`` number along the chain: differences tell how far apart two residues of a
            chain are, gaps of the model included.

    Raises:
        ValueError: no residues, lengths that disagree, an unknown letter.
    """

    name: str
    coordinates: Float[Tensor, "l 4 3"]
    sequence: str
    chains: list[str]
    numbers: list[str]
    index: Int[Tensor, " l"]

    def __post_init__(self) -> None:
        parts = (self.coordinates, self.sequence, self.chains, self.numbers, self.index)
        lengths = [len(part) for part in parts]
        if len(set(lengths)) != 1 or 0 in lengths:
            raise ValueError(f"{self.name}: the parts of a structure have lengths {lengths}")
        try:
            to_tokens(self.sequence, "protein")
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def native(self) -> Int[Tensor, " l"]:
        """The native sequence as tokens."""
        return to_tokens(self.sequence, "protein")

    @property
    def chain_index(self) -> Int[Tensor, " l"]:
        """The chain of each residue as a number."""
        names = list(dict.fromkeys(self.chains))
        return torch.tensor([names.index(c) for c in self.chains])

    def select(self, items: str | Sequence[str]) -> Bool[Tensor, " l"]:
        """Which residues ``items`` name: ``"A"``, ``"A:10"``, ``"A:10-20,B:52A"``, or a list.

        Numbers are the author's, both ends included.

        Raises:
            ValueError: something else, a chain or an end that the structure does not have, or an
                end before the start.
        """
        if isinstance(items, str):
            items = [item.strip() for item in items.split(",")]
        where = {at: i for i, at in enumerate(zip(self.chains, self.numbers, strict=True))}
        chosen = torch.zeros(len(self), dtype=torch.bool)
        for item in items:
            match = _ITEM.fullmatch(item)
            if not match:
                raise ValueError(f"{item!r} does not name residues; write A, A:10 or A:10-20")
            chain, first, last = match.groups()
            self._check_chain(chain)
            if first is None:
                chosen |= torch.tensor([c == chain for c in self.chains])
                continue
            ends = []
            for number in (first, last or first):
                if (chain, number) not in where:
                    own = [n for c, n in zip(self.chains, self.numbers, strict=True) if c == chain]
                    raise ValueError(
                        f"{self.name} has no residue {number} in chain {chain} ({item!r}); there "
                        f"are {len(own)} from {own[0]} to {own[-1]}"
                    )
                ends.append(where[chain, number])
            if ends[0] > ends[1]:
                raise ValueError(f"{item!r} ends before it starts")
            chosen[ends[0] : ends[1] + 1] = True
        return chosen

    def take_chains(self, chains: str | Sequence[str]) -> Structure:
        """The structure of these chains alone: ``"A"``, ``"A,B"`` or a list; order as it is."""
        names = [c.strip() for c in chains.split(",")] if isinstance(chains, str) else list(chains)
        for name in names:
            self._check_chain(name)
        keep = [i for i, c in enumerate(self.chains) if c in names]
        if not keep:
            raise ValueError(f"no chain of {self.name} was chosen")
        return Structure(
            self.name,
            self.coordinates[keep],
            "".join(self.sequence[i] for i in keep),
            [self.chains[i] for i in keep],
            [self.numbers[i] for i in keep],
            self.index[keep],
        )

    def recovery(self, tokens: Int[Tensor, "b l"], among: Bool[Tensor, " l"] | None = None):
        """Share of positions (of those ``among``) that have the native letter, ``(b,)``."""
        same = (tokens == self.native.to(tokens.device)).float()
        return same.mean(1) if among is None else same[:, among.to(tokens.device)].mean(1)

    def _check_chain(self, name: str) -> None:
        if name not in self.chains:
            raise ValueError(
                f"{self.name} has no protein chain {name!r}; it has "
                f"{', '.join(dict.fromkeys(self.chains))}"
            )


def read_structure(
    path: str | os.PathLike,
    chains: str | Sequence[str] | None = None,
    *,
    incomplete: str = "refuse",
) -> Structure:
    """Read the protein chains of a PDB or mmCIF file (also gzipped).

    Of several models (NMR) the first is read; of alternative conformations of a residue, or of
    alternative residues at one place, the one of highest occupancy (of equal ones the first). A
    modified residue counts as the amino acid it was made from (selenomethionine, MSE, as M).
    Ligands, water, nucleic acids and caps (ACE, NH2, ...) are left out. Chains have the author's
    names, as in the PDB format. Nothing is done about symmetry: give a file of the biological
    assembly if neighbours matter.

    Args:
        path: the file.
        chains: ``"A"``, ``"A,B"`` or a list; None: all protein chains.
        incomplete: "refuse" residues without all of N, CA, C, O, or "drop" them. A dropped residue
            leaves a gap, and no letter is designed for it.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: gemmi is not installed.
        ValueError: the file cannot be read or has no such protein chain, or a residue of it is
            incomplete or of an unknown kind; file and residue are named.
    """
    if incomplete not in ("refuse", "drop"):
        raise ValueError(f"incomplete must be 'refuse' or 'drop', but {incomplete!r} came")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        import gemmi
    except ImportError:
        raise ImportError("reading structures needs gemmi: pip install 'diffreward[bio]'") from None
    name = Path(path).name
    try:
        model = gemmi.read_structure(str(path))
        model.setup_entities()
        model = model[0]
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as PDB or mmCIF: {error}") from None

    names = chains.split(",") if isinstance(chains, str) else chains
    names = None if names is None else [n.strip() for n in names]
    kinds = {chain.name: chain.get_polymer().check_polymer_type() for chain in model}
    protein = [n for n, k in kinds.items() if "Peptide" in k.name]
    unfit = [n for n in (names or []) if n not in protein]
    if unfit or not protein or names == []:
        found = ", ".join(f"{n} ({k.name})" for n, k in kinds.items()) or "none"
        wanted = f"protein chain {', '.join(unfit)}" if unfit else "protein chain to read"
        raise ValueError(f"{name} has no {wanted}; its chains: {found}")

    rows = []
    for chain in model:
        if chain.name not in (names or protein):
            continue
        index, before = -1, None
        residues = [r for r in chain.get_polymer() if r.name not in CAPS]
        for (number, code), group in itertools.groupby(
            residues, key=lambda r: (r.seqid.num, r.seqid.icode.strip())
        ):
            residue = max(group, key=lambda r: max((a.occ for a in r), default=0.0))
            # insertions follow each other; a gap in the numbers is a gap in the chain
            index += 1 if before is None else max(1, number - before)
            before = number
            where = f"{name}: residue {chain.name} {number}{code} ({residue.name})"
            letter = _letter(gemmi.find_tabulated_residue(residue.name), where)
            atoms = _backbone(residue)
            lacking = [a for a in BACKBONE if a not in atoms]
            if lacking and incomplete == "refuse":
                raise ValueError(
                    f"{where} has no atom {', '.join(lacking)}; complete the model, or leave such "
                    "residues out with incomplete='drop'"
                )
            if not lacking:
                xyz = [atoms[a] for a in BACKBONE]
                rows.append((xyz, letter, chain.name, f"{number}{code}", index))
    if not rows:
        raise ValueError(f"{name} has no residue with all of {', '.join(BACKBONE)}")
    xyz, letters, of_chain, numbers, index = zip(*rows, strict=True)
    return Structure(
        name,
        torch.tensor(xyz),
        "".join(letters),
        list(of_chain),
        list(numbers),
        torch.tensor(index),
    )


def _letter(residue, where: str) -> str:
    """The letter of a residue type, of the amino acid it was made from if it is modified."""
    letter = residue.one_letter_code.upper()
    if residue.kind.name != "AA" or letter not in ALPHABETS["protein"]:
        raise ValueError(
            f"{where} is neither one of the 20 amino acids nor a known modification of one; "
            "remove it from the file, or choose other chains"
        )
    return letter


def _backbone(residue) -> dict[str, list[float]]:
    """Coordinates of the backbone atoms there are, of one conformation as far as it has them."""
    atoms = [a for a in residue if a.name in BACKBONE and all(map(math.isfinite, a.pos.tolist()))]
    occupancy: dict[str, float] = {}
    for a in atoms:
        occupancy[a.altloc] = occupancy.get(a.altloc, 0.0) + a.occ
    shared = "\0"  # gemmi's mark of an atom without alternatives
    labels = [label for label in occupancy if label != shared]
    best = max(labels, key=occupancy.__getitem__) if labels else shared
    # the last one wins: others, then shared, then the chosen conformation
    atoms.sort(key=lambda a: (a.altloc == best, a.altloc == shared, a.occ))
    return {a.name: a.pos.tolist() for a in atoms}
