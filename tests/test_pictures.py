import pytest
import torch
from PIL import Image

from diffreward import pictures


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
