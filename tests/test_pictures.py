import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffreward import pictures
from diffreward.samples import ALPHABETS, to_tokens


def alignment(*sequences, modality="dna"):
    return torch.stack([to_tokens(s, modality) for s in sequences])


def test_small_pictures_are_enlarged_without_smoothing():
    picture = torch.rand(3, 8, 8)
    sheet = pictures.image_grid(["one"], [("title", [pictures.Cell(picture, ("score 1",))])])
    exact = pictures.to_pil(picture).resize((208, 208), Image.Resampling.NEAREST)
    spot = sheet.crop((14, 0, 14 + 208, sheet.height))
    tops = [y for y in range(sheet.height - 208) if spot.crop((0, y, 208, y + 208)) == exact]
    assert len(tops) == 1


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (1024, 768)])
def test_grid_of_any_size(size):
    cells = [pictures.Cell(torch.rand(3, *size), ("a", "b" * 60)) for _ in range(3)]
    rows = [("a title that is long " * 30, cells), ("", cells)]
    sheet = pictures.image_grid(["x", "y", "z"], rows)
    assert sheet.width < 2500 and sheet.height < 2500


def test_pictures_keep_their_values(tmp_path):
    picture = torch.randint(0, 256, (3, 5, 7)) / 255
    pictures.save_image(tmp_path / "x.png", pictures.to_pil(picture))
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (7, 5)
        assert image.getpixel((6, 4)) == tuple((picture[:, 4, 6] * 255).round().int().tolist())


# -- logos --------------------------------------------------------------------------------------


def test_information_of_a_small_alignment_by_hand():
    """All alike: 2 bits. Half and half: 1. One of each: 0. Three and one: 2 - 0.8113."""
    found = pictures.letter_set("", alignment("AACA", "AAGA", "ATAA", "ATTC"), "dna")
    three = 2 - (0.75 * math.log2(4 / 3) + 0.25 * 2)
    heights = [[2, 0, 0, 0], [0.5, 0, 0, 0.5], [0, 0, 0, 0], [0.75 * three, 0.25 * three, 0, 0]]
    expected = torch.tensor(heights, dtype=torch.float64)
    torch.testing.assert_close(found.information, expected, rtol=0, atol=1e-12)
    assert found.count == pytest.approx(4)
    assert found.chance == pytest.approx(3 / (2 * 4 * math.log(2)))  # Schneider et al. 1986


@pytest.mark.parametrize("modality", ["dna", "protein"])
def test_information_is_biopythons(modality):
    motifs = pytest.importorskip("Bio.motifs")
    letters = ALPHABETS[modality]
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(letters), (9, 6), generator=g) // torch.arange(1, 7)
    words = ["".join(letters[k] for k in row) for row in tokens]
    expected = motifs.create(words, alphabet=letters).relative_entropy
    found = pictures.letter_set("", tokens, modality).information.sum(1)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_weights_count_like_copies():
    tokens = alignment("AC", "GC", "GT")
    weighted = pictures.letter_set("", tokens, "dna", torch.tensor([2.0, 1.0, 1.0]))
    copied = pictures.letter_set("", tokens[[0, 0, 1, 2]], "dna")
    torch.testing.assert_close(weighted.share, copied.share)
    assert weighted.count == pytest.approx(16 / 6)  # 1 / sum w^2
    relaxed = torch.tensor([[[0.5, 0.5, 0, 0]], [[0.5, 0, 0.5, 0]]])
    share = pictures.letter_set("", relaxed, "dna").share
    assert share.tolist() == [[0.5, 0.25, 0.25, 0]]
    one = pictures.letter_set("", tokens[:1], "dna")
    assert one.chance == 2  # no more than there is


def drawn(axis) -> dict[str, list[tuple[float, float, float, float]]]:
    """Colour -> the boxes (left, bottom, right, top) of its letters."""
    from matplotlib.colors import to_hex

    boxes = {}
    for patch in axis.patches:
        path, found = patch.get_path(), []
        starts = np.flatnonzero(path.codes == path.MOVETO)
        for part in np.split(path.vertices, starts[1:]):
            found.append((*part.min(0), *part.max(0)))
        boxes[to_hex(patch.get_facecolor())] = found
    return boxes


def test_letters_stand_on_each_other():
    """The most frequent on top; each as high as its share of the information."""
    words = ["TA", "TA", "TC", "CG"]
    figure = pictures.logo_figure([pictures.letter_set("x", alignment(*words), "dna")], "dna")
    (axis,) = figure.subfigs[0].axes
    boxes, three = drawn(axis), 2 - (0.75 * math.log2(4 / 3) + 0.25 * 2)
    (t,) = boxes[pictures.BASES["T"]]
    c = min(boxes[pictures.BASES["C"]])  # of the first position
    np.testing.assert_allclose(c[:2] + c[2:], (0.53, 0, 1.47, 0.25 * three), atol=1e-6)
    np.testing.assert_allclose(t, (0.53, 0.25 * three, 1.47, three), atol=1e-6)
    assert max(b[3] for found in boxes.values() for b in found) <= axis.get_ylim()[1]


def test_every_letter_fills_its_box():
    for letter in set("".join(ALPHABETS.values())):
        glyph = pictures._glyph(letter)
        left, bottom, right, top = *glyph.vertices.min(0), *glyph.vertices.max(0)
        assert (bottom, top) == (0, 1), letter
        assert (left, right) == ((0.3, 0.7) if letter == "I" else (0, 1)), letter
    for colours, modality in ((pictures.BASES, "dna"), (pictures.RESIDUES, "protein")):
        assert set(ALPHABETS[modality]) <= set(colours)


@pytest.mark.parametrize(("length", "lines"), [(1, 1), (50, 1), (51, 2), (200, 4)])
def test_long_sequences_go_on_below(length, lines, tmp_path):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, (8, length), generator=g)
    sets = [pictures.letter_set(title, tokens, "dna") for title in ("above", "below")]
    figure = pictures.logo_figure(sets, "dna")
    parts = [part.axes for part in figure.subfigs]
    assert [len(axes) for axes in parts] == [2] * lines
    assert [axes[0].get_title("left") for axes in parts] == ["above"] * lines
    ends = [max(box[2] for b in drawn(a).values() for box in b) for a, _ in parts]
    assert [math.floor(end) for end in ends] == [min(50 * (n + 1), length) for n in range(lines)]
    assert len({axis.get_ylim() for axes in parts for axis in axes}) == 1  # one scale
    pictures.save_figure(tmp_path / "logo.png", figure)
    with Image.open(tmp_path / "logo.png") as image:
        assert image.width == 1440


def test_a_logo_without_information(tmp_path):
    even = alignment("A", "C", "G", "T")
    figure = pictures.logo_figure([pictures.letter_set("even", even, "dna")], "dna")
    pictures.save_figure(tmp_path / "logo.png", figure)
