"""Every kind of image becomes 8-bit RGB and says what was converted, or is an error of its row."""

import io

import numpy as np
import pytest
import torch
from picture_files import BROKEN, picture, pixels, png_header
from PIL import Image, ImageCms

from diffreward.rewards.towers import Preprocess
from diffreward.scoring.decode import Decoder, decode_image, to_float
from diffreward.scoring.readers import Inputs, Item


def saved(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


RED = (200, 30, 40)


def test_plain_images_are_not_touched():
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        found, notes = decode_image(saved(picture(1), kind))
        assert found.dtype == np.uint8 and np.array_equal(found, pixels(1)) and notes == []


def test_grey_is_the_same_in_all_channels():
    found, notes = decode_image(saved(picture(1).convert("L"), "PNG"))
    assert np.array_equal(found, np.repeat(np.array(picture(1).convert("L"))[..., None], 3, axis=2))
    assert notes == []


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), c) for c in (RED, (0, 0, 255), (0, 255, 0))]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    found, notes = decode_image(file)
    assert np.array_equal(found, np.array(frames[0])) and "first frame of several" in notes


def test_cmyk():
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found, notes = decode_image(saved(ink, "TIFF"))
    assert notes == ["CMYK"] and np.array_equal(found, np.full((8, 8, 3), (255, 0, 0)))
    found, notes = decode_image(saved(ink, "JPEG"))
    assert notes == ["CMYK"] and np.abs(found.astype(int) - (255, 0, 0)).max() < 6


def test_palette():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    found, notes = decode_image(saved(image, "PNG"))
    assert notes == ["palette"] and np.array_equal(found, np.full((8, 8, 3), RED))
    found, notes = decode_image(saved(image, "PNG", transparency=1))
    assert notes == ["palette", "transparency on white"] and found.min() == 255


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (8, 8), (*RED, 0))
    image.paste((*RED, 255), (0, 0, 4, 8))
    image.paste((*RED, 51), (0, 0, 8, 1))  # a fifth of red, the rest white
    found, notes = decode_image(saved(image, "PNG"))
    assert notes == ["transparency on white"]
    assert np.array_equal(found[4, 0], RED) and np.array_equal(found[4, 7], (255, 255, 255))
    assert np.abs(found[0, 0] - (np.array(RED) / 5 + 255 * 4 / 5)).max() <= 1
    assert decode_image(saved(picture(1).convert("RGBA"), "PNG"))[1] == []  # opaque
    grey = Image.new("LA", (8, 8), (100, 0))
    assert decode_image(saved(grey, "PNG"))[0].min() == 255


def test_16_bits():
    grey = Image.fromarray(np.array([[0, 257 * 100, 257 * 200, 65535]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        found, notes = decode_image(saved(grey, kind))
        assert notes == ["16-bit"] and found[0, :, 1].tolist() == [0, 100, 200, 255]


def test_16_bits_of_each_colour():
    """PIL does not write them: the file is made by hand."""
    import struct
    import zlib

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row = b"\0" + struct.pack(">6H", *(257 * v for v in (*RED, 1, 2, 3)))
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    found, notes = decode_image(io.BytesIO(b"\x89PNG\r\n\x1a\n" + body))
    assert notes == ["16-bit"] and found.tolist() == [[list(RED), [1, 2, 3]]]


def test_lab_and_other_spaces():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(picture(1), *profiles, outputMode="LAB")
    try:
        found, notes = decode_image(saved(lab, "TIFF"))
    except ValueError:
        return  # an error of its row
    assert notes == ["LAB"] and np.abs(found.astype(int) - pixels(1)).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """Image stored turned, with the tag that undoes it: the upright one comes out."""
    turn = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = picture(1) if turn is None else picture(1).transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found, notes = decode_image(saved(stored, "PNG", exif=exif))
    assert np.array_equal(found, pixels(1)) and bool(notes) == (orientation != 1)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_errors_in_steady_words(kind, tmp_path):
    suffix, make = BROKEN[kind]
    path = tmp_path / f"bad{suffix}"
    make(1, path, tmp_path)
    resize = Preprocess((224, 224), (0.0,) * 3, (1.0,) * 3)
    item = Item(str(path), str(path))
    first, second = (Decoder("image", (resize,))[[item]] for _ in range(2))
    assert first.rows == [] and first.errors == second.errors
    assert kind != "a strip" or "too long and narrow" in first.errors[0]
    assert first.errors[0] and "0x" not in first.errors[0] and "\n" not in first.errors[0]


def test_what_pil_only_warns_of_is_refused():
    with pytest.raises(Image.DecompressionBombWarning, match="108000000 pixels"):
        decode_image(io.BytesIO(png_header(12_000, 9_000)))


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "p.png")
    assert Decoder("image")[[Item("p", str(tmp_path / "p.png"))]].errors == {0: "not a file"}


def test_what_could_not_be_listed_is_not_decoded(tmp_path):
    picture(0).save(tmp_path / "a.png")
    items = [Item("a", str(tmp_path / "a.png"), error="its prompt is lost"), Item("b", error="b")]
    found = Decoder("image")[items]
    assert found.rows == [] and found.errors == {0: "its prompt is lost", 1: "b"}


def test_errors_do_not_disturb_the_others(tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    for n in range(3):
        picture(n, height=24 + 8 * (n == 1)).save(tmp_path / f"{n}.png")
    resize = Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3)
    items = list(Inputs([tmp_path]))
    found = Decoder("image", (resize,))[items]
    assert [items[n].id[-5:] for n in found.rows] == ["0.png", "1.png", "2.png"]
    assert list(found.errors) == [3]
    assert [rows for rows, _ in found.raw] == [[0, 2], [1]]  # by size
    alone = torch.cat(
        [resize(to_float(pixels(n, height=24 + 8 * (n == 1))[None])) for n in range(3)]
    )
    torch.testing.assert_close(found.prepared[resize], alone, rtol=0, atol=0)


def test_images_of_one_height_and_other_widths_are_apart(tmp_path):
    for n, width in enumerate([32, 40, 32]):
        picture(n, width=width).save(tmp_path / f"{n}.png")
    found = Decoder("image")[list(Inputs([tmp_path]))]
    assert [(rows, group.shape) for rows, group in found.raw] == [
        ([0, 2], (2, 24, 32, 3)), ([1], (1, 24, 40, 3)),
    ]  # fmt: skip


def test_half_of_a_tar_member(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"x" * 100)
    item = Item("s.tar/a.png", str(tmp_path / "s.tar"), (50, 80))
    assert "ends after 50 of its 80 bytes" in Decoder("image")[[item]].errors[0]


def test_tokens():
    items = [
        Item("a", data="ACG"),
        Item("b", data="A"),
        Item("c", data="AXA"),
        Item("d", data="TTT"),
    ]
    found = Decoder("dna")[items]
    assert [(rows, group.tolist()) for rows, group in found.raw] == [
        ([0, 3], [[0, 1, 2], [3, 3, 3]]), ([1], [[0]]),
    ]  # fmt: skip
    assert list(found.errors) == [2]
