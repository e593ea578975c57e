"""Data sets of captioned pictures: manifests, folders, and drawn scenes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from manifest_files import BLUE, GREEN, RED, jsonl, picture, png
from PIL import Image

from diffreward.controlled import read_controlled
from diffreward.rewards import evaluate, make_reward, shapes


@pytest.fixture
def rows(tmp_path):
    found = []
    for name, colour in [("a", RED), ("b", GREEN), ("c", BLUE)]:
        picture(tmp_path / "images" / f"{name}.png", colour)
        found.append({"image": f"images/{name}.png", "text": f"caption {name}", "id": 3})
    return found


def colours(data, indices, what="data"):
    samples = data.load(indices)
    images = samples.data if what == "data" else samples.context[what]
    return (images[:, :, 0, 0] * 255).round().int().tolist()


# -- files ---------------------------------------------------------------------------------------


def test_a_manifest(tmp_path, rows):
    found = read_controlled(jsonl(tmp_path / "d.jsonl", rows))
    assert len(found) == 3 and found.prompts == ["caption a", "caption b", "caption c"]
    samples = found.load([2, 0])
    assert samples.modality == "image" and samples.prompts == ["caption c", "caption a"]
    assert samples.data.shape == (2, 3, 4, 6) and samples.context == {}
    assert colours(found, [2, 0]) == [[0, 0, 255], [255, 0, 0]]


@pytest.mark.parametrize("image", ["image", "file_name"])
@pytest.mark.parametrize("caption", ["text", "prompt", "caption"])
def test_names_of_columns(tmp_path, rows, image, caption):
    named = [{image: row["image"], caption: row["text"]} for row in rows]
    found = read_controlled(jsonl(tmp_path / "d.jsonl", named))
    assert found.prompts[1] == "caption b" and colours(found, [1]) == [[0, 255, 0]]


def test_the_first_of_several_captions_is_meant(tmp_path, rows):
    several = [row | {"caption": "no", "prompt": "no", "file_name": "none.png"} for row in rows]
    assert read_controlled(jsonl(tmp_path / "d.jsonl", several)).prompts[0] == "caption a"


def test_a_folder_with_a_manifest(tmp_path, rows):
    jsonl(tmp_path / "metadata.jsonl", rows)
    found = read_controlled(str(tmp_path))
    assert colours(found, [1]) == [[0, 255, 0]]
    with pytest.raises(FileNotFoundError, match="no file .*images/metadata.jsonl with pictures"):
        read_controlled(tmp_path / "images")


def test_parquet_with_bytes_structs_and_paths(tmp_path, rows):
    table = pa.table(
        {
            "image": [
                {"bytes": png(RED, (6, 4)), "path": None},
                {"bytes": None, "path": rows[1]["image"]},
            ],
            "control": [png(BLUE), png(GREEN)],
            "caption": ["p", "q"],
            "more": [1, 2],
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")
    found = read_controlled(tmp_path / "d.parquet")
    assert found.prompts == ["p", "q"]
    assert colours(found, [0, 1]) == [[255, 0, 0], [0, 255, 0]]
    assert colours(found, [0, 1], "control") == [[0, 0, 255], [0, 255, 0]]
    assert found.load([0]).context["control"].shape == (1, 3, 4, 4)


def test_control_images_come_with_the_data(tmp_path, rows):
    turned = [a | {"control": b["image"]} for a, b in zip(rows, rows[1:] + rows[:1], strict=True)]
    found = read_controlled(jsonl(tmp_path / "d.jsonl", turned))
    assert colours(found, [2, 0], "control") == [[255, 0, 0], [0, 255, 0]]
    some = found.take([2, 1])
    assert some.prompts == ["caption c", "caption b"] and len(some) == 2
    assert colours(some, [0]) == [[0, 0, 255]]
    assert colours(some, [1, 0], "control") == [[0, 0, 255], [255, 0, 0]]
    assert len(found) == 3


def test_control_images_are_read_off_the_pictures(tmp_path, rows):
    """Of grey levels: one colour each, whose luma is known."""
    found = read_controlled(jsonl(tmp_path / "d.jsonl", rows), {"luma": 2}, size=(4, 4))
    control = found.load([0, 2]).context["control"]
    assert control.shape == (2, 3, 4, 4) and not control.requires_grad
    expected = torch.tensor([0.299, 0.114]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(control, expected, atol=0.01, rtol=0)
    assert torch.equal(found.take([2]).load([0]).context["control"], control[1:])

    def half(images):
        assert not torch.is_grad_enabled()
        return images[:, :1] / 2

    own = read_controlled(tmp_path / "d.jsonl", half).load([0]).context["control"]
    assert (own == 0.5).all()


def test_pictures_and_control_images_are_scaled_and_cut(tmp_path):
    stripes = Image.new("RGB", (30, 10))
    for k, colour in enumerate([RED, GREEN, BLUE]):
        stripes.paste(colour, (10 * k, 0, 10 * k + 10, 10))
    stripes.save(tmp_path / "stripes.png")
    row = {"image": "stripes.png", "control": "stripes.png", "text": ""}
    found = read_controlled(jsonl(tmp_path / "d.jsonl", [row]))
    assert found.load([0]).data.shape == (1, 3, 10, 30)
    square = found.resized(10, 10).load([0])
    for images in (square.data, square.context["control"]):
        assert images.shape == (1, 3, 10, 10)
        assert (images[:, 1] == 1).all() and (images[:, [0, 2]] == 0).all()
    assert found.resized(4, 12).load([0]).data.shape == (1, 3, 4, 12)  # height, width
    assert read_controlled(tmp_path / "d.jsonl", size=[4, 12]).load([0]).data.shape[2:] == (4, 12)
    assert found.size is None


def test_classes_are_scaled_without_mixing_their_colours(tmp_path, rows):
    classes = np.random.default_rng(0).choice([20, 90, 250], (9, 9, 1)).repeat(3, 2)
    Image.fromarray(classes.astype(np.uint8)).save(tmp_path / "classes.png")
    row = rows[0] | {"control": "classes.png"}
    path = jsonl(tmp_path / "d.jsonl", [row])
    known = colours_of(read_controlled(path).load([0]).context["control"])
    assert len(known) == 3
    for size in (5, 20):
        smooth = read_controlled(path, size=(size, size)).load([0]).context["control"]
        found = read_controlled(path, size=(size, size), interpolate=False)
        assert colours_of(found.load([0]).context["control"]) <= known
        assert len(colours_of(smooth) - known) > 5
    assert found.about["interpolate"] is False and "interpolate" not in read_controlled(path).about
    with pytest.raises(ValueError, match="interpolate=False is of a column 'control'"):
        read_controlled(jsonl(tmp_path / "e.jsonl", rows), "edges", interpolate=False)


def colours_of(images):
    return set(map(tuple, images.movedim(1, -1).reshape(-1, 3).tolist()))


def test_first_and_count(tmp_path, rows):
    path = jsonl(tmp_path / "d.jsonl", rows)
    assert read_controlled(path, first=1).prompts == ["caption b", "caption c"]
    assert read_controlled(path, count=2).prompts == ["caption a", "caption b"]
    assert read_controlled(path, first=1, count=1).prompts == ["caption b"]
    assert read_controlled(path, first=2, count=5).prompts == ["caption c"]
    broken = [*rows[:2], rows[2] | {"image": "none.png"}]
    path = jsonl(tmp_path / "broken.jsonl", broken)
    assert len(read_controlled(path, count=2)) == 2  # others are not looked at
    with pytest.raises(FileNotFoundError, match="row 3: 'image': there is no image"):
        read_controlled(path, first=1)  # its row in the file


def test_what_a_run_keeps_of_it(tmp_path, rows):
    """Enough to see that another data set came."""

    def about(given, name="d.jsonl", **options):
        return read_controlled(jsonl(tmp_path / name, given), **options).about

    found = about(rows)
    assert found["source"] == str(tmp_path / "d.jsonl")
    assert (found["first"], found["count"]) == (0, None) and "control" not in found
    assert about(rows) == found and about(rows, "e.jsonl")["digest"] == found["digest"]
    picture(tmp_path / "other" / "a.png")
    changed = [
        [rows[0] | {"text": "caption d"}, *rows[1:]],
        [rows[0] | {"text": "other/caption a"}, *rows[1:]],
        [rows[0] | {"image": "other/a.png"}, *rows[1:]],
        [rows[0] | {"image": "images/b.png"}, *rows[1:]],
        [rows[1], rows[0], rows[2]],
        rows[:2],
        [row | {"control": row["image"]} for row in rows],
        [row | {"control": rows[0]["image"]} for row in rows],
    ]
    digests = [about(given)["digest"] for given in changed]
    assert len({found["digest"], *digests}) == len(changed) + 1
    assert about(rows, first=1)["digest"] != found["digest"]
    assert about(rows, control={"luma": 2})["control"] == {"luma": 2}
    assert about(rows, control="canny")["control"] == "canny"
    blobs = [pa.table({"image": [png(c)], "text": ["x"]}) for c in (RED, BLUE)]
    for k, table in enumerate(blobs):
        pq.write_table(table, tmp_path / f"{k}.parquet")
    red, blue = (read_controlled(tmp_path / f"{k}.parquet").about["digest"] for k in (0, 1))
    assert red != blue


# -- what is wrong -------------------------------------------------------------------------------


def test_what_is_wrong_with_a_data_set(tmp_path, rows):
    def refused(given, says, kind=ValueError, **options):
        with pytest.raises(kind, match=says):
            read_controlled(jsonl(tmp_path / "d.jsonl", given), **options)

    good = rows[0]
    refused([{"image": good["image"]}], r"needs the columns 'image' .* and there is image$")
    refused([{"text": "x", "id": 1}], r"\(or 'prompt', 'caption'\), and there is text, id$")
    refused([], "needs the columns .* there is nothing")
    refused([good], "has no rows beyond the first 1$", first=1)
    refused([good | {"image": None}], "row 1: 'image' is a path or the bytes .* but None came")
    refused([good | {"image": 5}], "row 1: 'image' is a path .* but 5 came")
    refused([good, good | {"image": ""}], "row 2: 'image' is a path .* but '' came")
    refused([good, good | {"image": "x.png"}], "row 2: 'image': .* no image .*x.png", OSError)
    refused([good | {"text": None}], "row 1: 'text' is a text, but None came")
    refused([good, {"image": good["image"]}], "row 2: 'text' is a text, but None came")
    control = good | {"control": good["image"]}
    refused([control, good], "row 2: 'control' is a path .* but None came")
    refused([control | {"control": "x.png"}], "row 1: 'control': there is no image", OSError)
    refused([control], "has a column 'control', and .* read off.* leave one", control="canny")
    refused([good], "first must be 0 or more and count 1 or more, but -1, None came", first=-1)
    refused([good], "count 1 or more, but 0, 0 came", count=0)
    refused([good], r"size is a height and a width, 1 or more, but \(0, 4\)", size=(0, 4))
    refused([good], r"size is a height and a width, 1 or more, but \(4,\)", size=[4])
    refused([good], "no extractor 'cany'; did you mean 'canny'|did you mean", control="cany")
    refused([[1]], r"line 1: a row is an object, but \[1\] came")
    with pytest.raises(FileNotFoundError, match="there is no file .*none.jsonl with pictures"):
        read_controlled(tmp_path / "none.jsonl")
    (tmp_path / "d.csv").write_text("image,text\n")
    with pytest.raises(ValueError, match="pictures are read from .jsonl, .* files, not d.csv"):
        read_controlled(tmp_path / "d.csv")


def test_pictures_that_cannot_be_opened_or_differ_are_named(tmp_path, rows):
    picture(tmp_path / "images" / "b.png", size=(8, 8))
    found = read_controlled(jsonl(tmp_path / "d.jsonl", rows))
    with pytest.raises(ValueError, match=r"row 2 is 8x8, but .*row 1 4x6; give a size"):
        found.load([0, 1])
    assert found.resized(4, 4).load([0, 1]).data.shape == (2, 3, 4, 4)
    (tmp_path / "images" / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="d.jsonl, row 3 cannot be opened as an image"):
        found.load([2])


# -- scenes --------------------------------------------------------------------------------------


def test_scenes_show_what_their_captions_say():
    found = read_controlled("embedded:scenes", count=24)
    samples = found.load(range(24))
    assert samples.data.shape == (24, 3, 64, 64) and samples.context == {}
    assert samples.prompts == found.prompts and len(set(found.prompts)) > 12
    assert (evaluate(make_reward("shapes_checker"), samples).value == 1).all()
    turned = samples.prompts[1:] + samples.prompts[:1]
    samples.prompts[:] = turned
    assert evaluate(make_reward("shapes_checker"), samples).value.mean() < 0.3


def test_a_scene_is_the_same_whenever_it_is_asked_for():
    found = read_controlled("embedded:scenes", count=12)
    images = found.load(range(12)).data
    again = read_controlled("embedded:scenes", count=12)
    assert torch.equal(again.load([7, 3]).data, images[[7, 3]])
    assert torch.equal(again.load([3]).data, images[[3]])
    later = read_controlled("embedded:scenes", first=5, count=3)
    assert later.prompts == found.prompts[5:8]
    assert torch.equal(later.load(range(3)).data, images[5:8])
    assert torch.equal(found.take([5, 6]).load([1]).data, images[[6]])
    assert len({image.numpy().tobytes() for image in images}) == 12
    assert later.about == {"source": "embedded:scenes", "first": 5, "count": 3}


def test_scenes_are_many_by_default_and_drawn_in_one_size():
    assert len(read_controlled("embedded:scenes")) == 1024
    found = read_controlled("embedded:scenes", "segmentation", count=2, size=[64, 64])
    samples = found.load([0, 1])
    palette = torch.tensor([(255, 255, 255), *shapes.COLOURS.values()]) / 255
    pixels = samples.context["control"].permute(0, 2, 3, 1).reshape(-1, 3)
    off = (pixels[:, None] - palette).abs().amax(2)
    assert (off.min(1).values < 1e-6).all()  # each is a colour of the palette
    nearest = (samples.data.permute(0, 2, 3, 1).reshape(-1, 3)[:, None] - palette).norm(dim=2)
    assert torch.equal(off.argmin(1), nearest.argmin(1))
    with pytest.raises(ValueError, match="drawn at 64x64, but this model's pictures are 32x16"):
        found.resized(32, 16).load([0])


def test_numbers_are_drawn_as_numpy_says():
    """The scene of a number is its generator's first draw, and the picture the next."""
    rng = np.random.default_rng([2024, 9])
    scene = shapes.random_scene(rng)
    expected = torch.from_numpy(shapes.render(scene, rng)).permute(2, 0, 1) / 255
    found = read_controlled("embedded:scenes", first=9, count=1)
    assert found.prompts == [scene.caption()]
    assert torch.equal(found.load([0]).data[0], expected.float())
