"""Image files of every kind, good and broken, for tests of scoring."""

import os
import struct
import zlib

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Smooth colours that differ from seed to seed, uint8 RGB."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, (2, 2, 3))
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    top, bottom = (row[0] * (1 - x) + row[1] * x for row in corners)
    return (top * (1 - y) + bottom * y).round().astype(np.uint8)


def picture(seed: int, **size) -> Image.Image:
    return Image.fromarray(pixels(seed, **size))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + data


def _encoded(seed: int, end: str, folder) -> bytes:
    file = folder / f"whole{end}"
    picture(seed, height=48, width=64).save(file)
    data = file.read_bytes()
    file.unlink()
    return data


def _bad_checksum(seed, path, folder):
    data = bytearray(_encoded(seed, ".png", folder))
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _float_tiff(seed, path, folder):
    Image.fromarray(pixels(seed)[..., 0].astype(np.float32)).save(path, format="TIFF")


# kind -> (suffix, what makes one)
BROKEN = {
    "empty": (".png", lambda seed, path, folder: path.touch()),
    "bomb": (".png", lambda seed, path, folder: path.write_bytes(png_header(60000, 60000))),
    "half a png": (
        ".png",
        lambda seed, path, folder: path.write_bytes(_encoded(seed, ".png", folder)[:-200]),
    ),
    "half a jpeg": (
        ".jpg",
        lambda seed, path, folder: path.write_bytes(_encoded(seed, ".jpg", folder)[:-300]),
    ),
    "half a webp": (
        ".webp",
        lambda seed, path, folder: path.write_bytes(_encoded(seed, ".webp", folder)[:-40]),
    ),
    "bad checksum": (".png", _bad_checksum),
    "a web page": (".jpg", lambda seed, path, folder: path.write_text(f"<html>{seed}</html>")),
    "noise": (
        ".gif",
        lambda seed, path, folder: path.write_bytes(np.random.default_rng(seed).bytes(500)),
    ),
    "broken link": (".png", lambda seed, path, folder: path.symlink_to(folder / "gone.png")),
    "link to itself": (".png", lambda seed, path, folder: path.symlink_to(path)),
    "no range": (".tif", _float_tiff),
    "a strip": (
        ".png",
        lambda seed, path, folder: Image.new("RGB", (70000, 1), (seed % 255, 9, 9)).save(path),
    ),
}


def folder_of(folder, count: int, broken: int = 0):
    """``count`` files below a new folder, ``broken`` of them of all kinds of `BROKEN` in turn.

    Returns:
        The names of the broken ones. A strip is only broken for rewards that resize.
    """
    folder.mkdir()
    names, kinds = [], list(BROKEN)
    every = count // broken if broken else count + 1
    for n in range(count):
        inside = folder / f"part-{n % 3}"
        inside.mkdir(exist_ok=True)
        if broken and n % every == 0 and len(names) < broken:
            suffix, make = BROKEN[kinds[len(names) % len(kinds)]]
            path = inside / f"{n:05d}{suffix}"
            make(n, path, folder)
            names.append(os.fspath(path))
        else:
            height = 24 + 8 * (n % 2)
            picture(n, height=height).save(inside / f"{n:05d}.png", compress_level=1)
    return names
