"""Structures from files: hand-written PDB lines, and what must become of them."""

import gzip

import gemmi
import pytest
import torch

from diffreward._assets import asset_path
from diffreward.networks.structure import Structure, read_structure


def atom(name, residue, chain, number, x=0.0, *, alt=" ", code=" ", occupancy=1.0, het=False):
    record = "HETATM" if het else "ATOM  "
    return (
        f"{record}    1  {name:<3}{alt}{residue:>3} {chain}{number:>4}{code}   "
        f"{x:8.3f}{0:8.3f}{0:8.3f}{occupancy:6.2f}{0:6.2f}          {name[0]:>2}"
    )


def residue(name, chain, number, x=0.0, atoms=("N", "CA", "C", "O"), **options):
    """Lines of a residue whose atoms lie at x, x + 0.1, ..."""
    return [
        atom(a, name, chain, number, x + i / 10, **options)
        for i, a in enumerate(("N", "CA", "C", "O"))
        if a in atoms
    ]


@pytest.fixture
def read(tmp_path):
    def write_and_read(lines, chains=None, **options):
        path = tmp_path / "test.pdb"
        path.write_text("\n".join([*lines, "END", ""]))
        return read_structure(path, chains, **options)

    return write_and_read


def test_ubiquitin():
    s = read_structure(asset_path("structures") / "1ubi.pdb")
    # Swiss-Prot P0CG48, residues 1-76
    assert s.sequence == (
        "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
    )
    assert s.chains == ["A"] * 76 and s.numbers == [str(i + 1) for i in range(76)]
    assert s.index.tolist() == list(range(76))
    assert s.coordinates[0, 0].tolist() == pytest.approx([27.343, 24.294, 2.683])
    ca = s.coordinates[:, 1]
    apart = (ca[1:] - ca[:-1]).norm(dim=1)
    assert apart.min() > 3.6 and apart.max() < 4.0
    bond = (s.coordinates[:, 1] - s.coordinates[:, 0]).norm(dim=1)
    assert (bond - 1.46).abs().max() < 0.1


def test_mmcif_and_gzip_give_the_same(tmp_path):
    path = asset_path("structures") / "1ubi.pdb"
    expected = read_structure(path)
    gemmi.read_structure(str(path)).make_mmcif_document().write_file(str(tmp_path / "1ubi.cif"))
    with gzip.open(tmp_path / "1ubi.pdb.gz", "wt") as f:
        f.write(path.read_text())
    for name in ("1ubi.cif", "1ubi.pdb.gz"):
        s = read_structure(tmp_path / name)
        assert (s.sequence, s.chains, s.numbers) == (
            expected.sequence,
            expected.chains,
            expected.numbers,
        )
        torch.testing.assert_close(s.coordinates, expected.coordinates)


def test_gaps_insertions_and_chains(read):
    lines = [
        *residue("ALA", "A", 10),
        *residue("CYS", "A", 11),
        *residue("ASP", "A", 11, code="A"),
        *residue("GLU", "A", 12),
        *residue("PHE", "A", 20),
        "TER",
        *residue("GLY", "B", -1),
        *residue("HIS", "B", 0),
        "TER",
        atom("O", "HOH", "A", 301, het=True),
        atom("ZN", "ZN", "B", 302, het=True),
    ]
    s = read(lines)
    assert s.sequence == "ACDEFGH" and s.chains == list("AAAAABB")
    assert s.numbers == ["10", "11", "11A", "12", "20", "-1", "0"]
    assert s.index.tolist() == [0, 1, 2, 3, 11, 0, 1]
    assert s.chain_index.tolist() == [0] * 5 + [1] * 2
    assert read(lines, "B").sequence == "GH"
    assert read(lines, ["B", "A"]).sequence == "ACDEFGH"  # in the file's order
    assert s.take_chains("B").numbers == ["-1", "0"]

    def chosen(items):
        return "".join(c for c, yes in zip(s.sequence, s.select(items), strict=True) if yes)

    assert chosen("A") == "ACDEF"
    assert chosen("A:11-12") == "CDE"
    assert chosen("A:11A, B:-1") == "DG"
    assert chosen(["B:-1-0", "A:20"]) == "FGH"
    with pytest.raises(ValueError, match="no protein chain 'C'; it has A, B"):
        s.select("C")
    with pytest.raises(ValueError, match=r"no residue 13 in chain A.*5 from 10 to 20"):
        s.select("A:10-13")
    with pytest.raises(ValueError, match="before it starts"):
        s.select("A:12-10")
    with pytest.raises(ValueError, match="does not name residues"):
        s.select("A:x")


def test_of_alternatives_the_fuller_one_is_read(read):
    lines = [
        *residue("ALA", "A", 1, 1.0, atoms=("N",)),  # shared by both conformations
        *residue("ALA", "A", 1, 2.0, atoms=("CA", "C", "O"), alt="A", occupancy=0.4),
        *residue("ALA", "A", 1, 3.0, atoms=("CA", "C", "O"), alt="B", occupancy=0.6),
        *residue("SER", "A", 2, 4.0, alt="A", occupancy=0.5),
        *residue("SER", "A", 2, 5.0, alt="B", occupancy=0.5),
        *residue("PRO", "A", 3, 6.0, alt="A", occupancy=0.3),  # two residues at one place
        *residue("LEU", "A", 3, 7.0, alt="B", occupancy=0.7),
    ]
    s = read(lines)
    assert s.sequence == "ASL"
    assert s.coordinates[:, :, 0].tolist() == [
        pytest.approx(row)
        for row in ([1.0, 3.1, 3.2, 3.3], [4.0, 4.1, 4.2, 4.3], [7.0, 7.1, 7.2, 7.3])
    ]


def test_modified_residues_count_as_their_parents(read):
    lines = [
        atom("C", "ACE", "A", 0, het=True),
        *residue("MSE", "A", 1, het=True),
        *residue("SEP", "A", 2, het=True),
        *residue("GLY", "A", 3),
        atom("N", "NH2", "A", 4, het=True),
    ]
    assert read(lines).sequence == "MSG"


@pytest.mark.parametrize("name", ["UNK", "SEC", "DAL", "XQZ"])
def test_unknown_residues_are_refused(read, name):
    lines = [*residue("GLY", "A", 4), *residue(name, "A", 5), *residue("GLY", "A", 6)]
    with pytest.raises(ValueError, match=rf"test\.pdb: residue A 5 \({name}\)"):
        read(lines)


def test_incomplete_residues(read):
    lines = [
        *residue("GLY", "A", 4),
        *residue("LYS", "A", 5, atoms=("N", "CA", "C")),
        *residue("ALA", "A", 6),
    ]
    with pytest.raises(ValueError, match=r"test\.pdb: residue A 5 \(LYS\) has no atom O"):
        read(lines)
    s = read(lines, incomplete="drop")
    assert s.sequence == "GA" and s.index.tolist() == [0, 2]
    with pytest.raises(ValueError, match="no residue with all of"):
        read([*residue("GLY", "A", 4, atoms=("CA",))], incomplete="drop")
    with pytest.raises(ValueError, match="'refuse' or 'drop'"):
        read(lines, incomplete="ignore")


def test_files_that_are_refused(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pdb"):
        read_structure(tmp_path / "none.pdb")
    dna = [atom("P", "DA", "C", 1), atom("P", "DC", "C", 2), atom("P", "DG", "C", 3)]
    with pytest.raises(ValueError, match=r"no protein chain to read; its chains: C \(Dna\)"):
        read(dna)
    with pytest.raises(ValueError, match=r"no protein chain C, X; its chains: A.*C"):
        read([*residue("GLY", "A", 1), "TER", *dna], "C,X")
    assert read([*residue("GLY", "A", 1), "TER", *dna]).sequence == "G"
    (tmp_path / "text.cif").write_text("this is no mmCIF")
    with pytest.raises(ValueError, match=r"text\.cif cannot be read"):
        read_structure(tmp_path / "text.cif")
    with pytest.raises(ValueError, match="cannot be read|no protein chain"):
        read([])


def test_parts_that_do_not_fit_together():
    good = {
        "name": "x",
        "coordinates": torch.zeros(2, 4, 3),
        "sequence": "AC",
        "chains": ["A", "A"],
        "numbers": ["1", "2"],
        "index": torch.arange(2),
    }
    assert len(Structure(**good)) == 2
    with pytest.raises(ValueError, match="lengths"):
        Structure(**{**good, "chains": ["A"]})
    with pytest.raises(ValueError, match="letter 2 is 'B'"):
        Structure(**{**good, "sequence": "AB"})


def test_recovery():
    s = read_structure(asset_path("structures") / "1ubi.pdb")
    tokens = s.native.repeat(2, 1)
    tokens[1, :19] = (tokens[1, :19] + 1) % 20
    assert s.recovery(tokens).tolist() == [1.0, 0.75]
    assert s.recovery(tokens, s.select("A:1-38")).tolist() == [1.0, 0.5]
