import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from manifest_files import BLUE, RED, jsonl, picture, png
from PIL import Image

from diffreward.preferences import read_preferences


@pytest.fixture
def pair(tmp_path):
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "b.png", BLUE)
    return {"prompt": "a heart", "chosen": "images/a.png", "rejected": "images/b.png", "id": 7}


def test_pairs_of_images(tmp_path, pair):
    other = pair | {"prompt": "", "chosen": pair["rejected"], "rejected": pair["chosen"]}
    found = read_preferences(jsonl(tmp_path / "p.jsonl", [pair, other]))
    assert found.paired and len(found) == 4 and found.num_groups == 2
    assert found.prompts == ["a heart", "a heart", "", ""]
    assert found.label.tolist() == [1, -1, 1, -1] and found.groups.tolist() == [0, 0, 1, 1]
    assert found.rows == [1, 1, 2, 2]
    assert found.members([1, 0]) == [2, 3, 0, 1]
    samples = found.load(found.members([1, 0]))
    assert samples.modality == "image" and samples.prompts == ["", "", "a heart", "a heart"]
    assert samples.data.shape == (4, 3, 4, 6)
    assert samples.data[:, :, 0, 0].tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("yes, no", [(True, False), (1, 0), (1, -1), (1.0, 0.0)])
def test_labels(tmp_path, pair, yes, no):
    rows = [
        {"prompt": "x", "sample": pair["chosen"], "label": yes},
        {"prompt": "y", "sample": pair["rejected"], "label": no},
        {"prompt": "z", "sample": pair["rejected"], "label": no},
    ]
    found = read_preferences(jsonl(tmp_path / "p.jsonl", rows))
    assert not found.paired and found.num_groups == len(found) == 3
    assert found.label.tolist() == [1, -1, -1] and found.groups.tolist() == [0, 1, 2]
    assert found.members([2, 0]) == [2, 0]
    assert found.load([1]).data[0, :, 0, 0].tolist() == [0, 0, 1]


def test_parquet_with_embedded_images(tmp_path, pair):
    """As data sets have them: a struct, or bytes; a path where there are no bytes."""
    table = pa.table(
        {
            "prompt": ["p", "q"],
            "chosen": [{"bytes": png(RED), "path": None}, {"bytes": None, "path": pair["chosen"]}],
            "rejected": [png(BLUE), png(BLUE)],
            "more": [1, 2],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    found = read_preferences(tmp_path / "p.parquet")
    samples = found.load(range(4), size=(2, 2))
    assert samples.data.shape == (4, 3, 2, 2)
    assert samples.data[:, 0].mean((1, 2)).tolist() == [1, 0, 1, 0]


def test_images_are_scaled_and_cut_around_the_middle(tmp_path):
    """Three upright stripes; a square is cut from the middle one."""
    image = Image.new("RGB", (30, 10))
    for k, colour in enumerate([RED, (0, 255, 0), BLUE]):
        image.paste(colour, (10 * k, 0, 10 * k + 10, 10))
    image.save(tmp_path / "stripes.png")
    picture(tmp_path / "b.png", BLUE)
    row = {"prompt": "", "chosen": "stripes.png", "rejected": "b.png"}
    found = read_preferences(jsonl(tmp_path / "p.jsonl", [row]))
    green = found.load([0], size=(10, 10)).data[0]
    assert (green[1] == 1).all() and (green[[0, 2]] == 0).all()
    wide = found.load([0, 1], size=(4, 12)).data  # height, width
    assert wide.shape == (2, 3, 4, 12)
    with pytest.raises(ValueError, match=r"row 1 \(.*b.png\) has the shape .* give a size"):
        found.load([0, 1])


def test_pairs_of_sequences(tmp_path):
    rows = [{"prompt": "", "chosen": "acgt", "rejected": "TTTT"}]
    found = read_preferences(jsonl(tmp_path / "p.jsonl", rows), "dna")
    samples = found.load([0, 1])
    assert samples.modality == "dna"
    assert torch.equal(samples.data, torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3]]))
    rows[0]["rejected"] = "TTT"
    uneven = read_preferences(jsonl(tmp_path / "p.jsonl", rows), "dna")
    with pytest.raises(ValueError, match="row 1 has the shape .* give them one length"):
        uneven.load([0, 1])


def test_what_is_wrong_with_a_data_set(tmp_path, pair):
    def refused(rows, says, kind=ValueError, modality="image"):
        with pytest.raises(kind, match=says):
            read_preferences(jsonl(tmp_path / "p.jsonl", rows), modality)

    without = {k: v for k, v in pair.items() if k != "rejected"}
    refused([without], r"no column 'rejected'; expected prompt, chosen, rejected, or .* 'id'")
    refused([{"chosen": "a", "rejected": "b"}], "no column 'prompt'")
    refused([{"prompt": "a", "sample": "b"}], "no column 'label'")
    refused([pair | {"sample": "x", "label": 1}], "has both")
    refused([pair, without], "p.jsonl, row 2 has no 'rejected'")
    refused([pair, pair | {"chosen": "none.png"}], r"row 2: there is no image .*none.png", OSError)
    refused([pair, pair | {"chosen": None}], "row 2: 'chosen' is empty")
    refused([pair | {"prompt": None}], "row 1: 'prompt' is empty")
    refused([pair | {"prompt": 5}], "row 1: a prompt is a text, but 5 came")
    refused([pair | {"chosen": 5}], "row 1: an image is a path or bytes, but 5 came")
    refused([pair | {"rejected": pair["chosen"]}], "row 1: 'chosen' and 'rejected' are the same")
    refused([], "has no rows")
    refused([[1]], r"line 1: a row is an object, but \[1\] came")
    good = {"prompt": "x", "sample": pair["chosen"], "label": 1}
    refused([good, good], r"no sample is undesirable \(label 0\)")
    refused([good | {"label": False}], r"no sample is desirable \(label 1\)")
    refused([good, good | {"label": 2}], "row 2: a label is true or false.* but 2 came")
    refused([good | {"label": "yes"}], "row 1: a label is true or false.* but 'yes' came")
    refused([good | {"sample": "ACX"}], "row 1: letter 3 is 'X'", modality="dna")
    refused([good | {"sample": 3}], "row 1: a sequence is a text", modality="dna")
    refused([good], "modality='audio' came", modality="audio")


def test_files_that_cannot_be_read(tmp_path, pair):
    with pytest.raises(FileNotFoundError, match="no file .*none.jsonl"):
        read_preferences(tmp_path / "none.jsonl")
    (tmp_path / "p.csv").write_text("prompt\n")
    with pytest.raises(
        ValueError, match="are read from .jsonl, .ndjson, .parquet files, not p.csv"
    ):
        read_preferences(tmp_path / "p.csv")
    (tmp_path / "bad.jsonl").write_text(json.dumps(pair) + "\n{")
    with pytest.raises(ValueError, match="line 2, is not JSON"):
        read_preferences(tmp_path / "bad.jsonl")
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_preferences(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"prompt": ["a"], "win": ["b"]}), tmp_path / "other.parquet")
    with pytest.raises(
        ValueError, match="no column 'chosen', 'rejected'.* there is 'prompt', 'win'"
    ):
        read_preferences(tmp_path / "other.parquet")
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    found = read_preferences(jsonl(tmp_path / "p.jsonl", [pair]))
    with pytest.raises(ValueError, match=r"row 1 \(.*a.png\) cannot be opened as an image"):
        found.load([0])
