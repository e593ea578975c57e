"""Files of weights: found where they are, and noticed when they are replaced."""

import os

import pytest
import torch
from safetensors.torch import save_file
from tiny_towers import (
    linear_head,
    open_clip_architecture,
    save_open_clip,
    save_siglip,
    save_transformers_clip,
)

from diffreward.rewards import RewardInfo, as_reward, make_reward
from diffreward.rewards.weights import fingerprints, weights_file, weights_fingerprint


def test_weights_file_is_a_path_or_on_the_hub(tmp_path):
    (tmp_path / "head.pth").touch()
    assert weights_file(str(tmp_path / "head.pth")) == str(tmp_path / "head.pth")
    for missing in [str(tmp_path / "no.pth"), "no.pth", "./a/b/no.pth", "a/no.pth"]:
        with pytest.raises(FileNotFoundError, match="there is no file"):
            weights_file(missing)
    with pytest.raises(FileNotFoundError, match="fetch it yourself"):
        weights_file("nobody/nothing/no.pth")  # tests are offline


LAION = [f"layers.{i}" for i in (0, 2, 4, 6, 7)]
V2_5 = [f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)]


def saved(folder):
    """Specs of rewards that read local files, and what of each is replaced below."""
    for name, save in [("open", save_open_clip), ("clip", save_transformers_clip)]:
        save(folder / name)
    save_siglip(folder / "siglip")
    save_file(linear_head(16, LAION), folder / "head.safetensors")
    torch.save(linear_head(32, V2_5), folder / "v2_5.pth")
    torch.save(open_clip_architecture(folder, "tiny-arch").state_dict(), folder / "arch.pt")
    torch.save(torch.load(folder / "arch.pt"), folder / "HPS_v2.1_compressed.pt")
    return {
        "a folder of open_clip": (
            {"name": "clip_score", "model": f"local-dir:{folder}/open"},
            "open/open_clip_model.safetensors",
        ),
        "a folder of transformers": (
            {"name": "clip_score", "model": f"transformers:{folder}/clip"},
            "clip/model.safetensors",
        ),
        "a checkpoint": (
            {"name": "clip_score", "model": "tiny-arch", "pretrained": f"{folder}/arch.pt"},
            "arch.pt",
        ),
        "a head": (
            {"name": "aesthetic", "head": f"{folder}/head.safetensors", "model": f"{folder}/clip"},
            "head.safetensors",
        ),
        "the tower under a head": (
            {"name": "aesthetic", "head": f"{folder}/head.safetensors", "model": f"{folder}/clip"},
            "clip/model.safetensors",
        ),
        "pickscore": ({"name": "pickscore", "model": f"{folder}/clip"}, "clip/model.safetensors"),
        "a file in a folder": (
            {"name": "hpsv2", "weights": f"{folder}", "model": "tiny-arch"},
            "HPS_v2.1_compressed.pt",
        ),
        "siglip": (
            {"name": "siglip_aesthetic", "head": f"{folder}/v2_5.pth", "model": f"{folder}/siglip"},
            "v2_5.pth",
        ),
    }


def test_weights_replaced_under_the_same_name_are_noticed(tmp_path):
    for what, (spec, replaced) in saved(tmp_path).items():
        reward, file = make_reward(spec), tmp_path / replaced
        nested = make_reward(
            {"weighted_sum": ["jpeg_compressibility", {"standardize": {"reward": reward, "mean": 0,
             "std": 1}}]}
        )  # fmt: skip
        before = weights_fingerprint(reward)
        assert str(file) in before, what
        assert weights_fingerprint(make_reward(spec)) == before, what  # that of the files alone
        assert weights_fingerprint(nested) == before, what
        content = file.read_bytes()
        middle = slice(len(content) // 2, len(content) // 2 + 2**17)
        inverted = bytes(255 - byte for byte in content[middle])
        for changed in (
            content + b" ",
            content[: middle.start] + inverted + content[middle.stop :],
            content[:-1] + bytes([content[-1] ^ 1]),
        ):
            file.write_bytes(changed)
            for one in (reward, nested):
                after = weights_fingerprint(one)
                assert {path for path in before if after[path] != before[path]} == {str(file)}, what
        file.write_bytes(content)
        os.utime(file, (0, 0))
        assert weights_fingerprint(reward) == before, what


@pytest.mark.parametrize("size", [1, 2**16, 64 * 2**16, 64 * 2**16 + 1, 10**8])
def test_the_ends_of_a_file_of_any_size_count(tmp_path, size):
    file = tmp_path / "model.bin"
    reward = as_reward(len, RewardInfo("any", weights=str(file)))
    with open(file, "wb") as opened:
        opened.truncate(size)
    marks = [weights_fingerprint(reward)[str(file)]]
    for at in {0, size - 1}:
        with open(file, "r+b") as opened:
            opened.seek(at)
            opened.write(b"1")
        marks.append(weights_fingerprint(reward)[str(file)])
    with open(file, "r+b") as opened:
        opened.truncate(size + 1)
    marks.append(weights_fingerprint(reward)[str(file)])
    assert len(set(marks)) == len(marks)


def test_only_local_weights_have_a_fingerprint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.json").write_text("{}")  # of somebody else, where no weights are named
    for spec in [
        "colorfulness",
        "clip_score",  # embedded
        {"weighted_sum": ["clip_judge", "contrast"]},
        as_reward(len, RewardInfo("hub", weights="ViT-L-14 (openai) + ORG/REPO/head.pth")),
        as_reward(len, RewardInfo("url", weights=f"https://a.example/{'a' * 5000}")),
    ]:
        assert weights_fingerprint(make_reward(spec)) == {}
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model.bin").touch()
    (tmp_path / "w" / "train.log").touch()
    relative = as_reward(len, RewardInfo("relative", weights="w"))
    assert list(weights_fingerprint(relative)) == [str(tmp_path / "w" / "model.bin")]


def test_fingerprints_see_small_changes_of_large_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    large = tmp_path / "large.pt"
    with open(large, "wb") as file:
        file.truncate(200 * 2**20)  # a hole: no disk is needed
    marks = {fingerprints(str(large))[str(large)]}
    for place in (0, 100 * 2**20, 200 * 2**20 - 1, 200 * 2**20):  # the last makes it longer
        with open(large, "r+b") as file:
            file.seek(place)
            file.write(b"x" * (4 * 2**20 if place == 100 * 2**20 else 1))  # between two pieces: 3
        marks.add(fingerprints("large.pt")[str(large)])
    assert len(marks) == 5


def test_fingerprints_of_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = tmp_path / "m" / "a.safetensors"
    small.parent.mkdir()
    (tmp_path / "m" / "notes.md").write_text("not weights")
    small.write_bytes(b"1" * 3_000_000)
    whole = fingerprints(str(small))
    assert len(whole) == 1 and fingerprints(f"local-dir:{tmp_path}/m") == whole
    small.write_bytes(b"1" * 1_500_000 + b"2" + b"1" * 1_499_999)
    assert fingerprints("transformers:m") != whole
    for text in ("", "no such file", "x" * 10_000, "a\0b"):
        assert fingerprints(text) == {}
