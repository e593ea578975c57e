"""Scoring whole folders: nothing lost, nothing computed twice, the same whatever happens."""

import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from picture_files import folder_of, picture, pixels
from tiny_towers import save_open_clip

from diffreward.rewards import RewardInfo, Scores, evaluate, make_reward
from diffreward.rewards.towers import Preprocess, share_towers
from diffreward.samples import Samples
from diffreward.scoring import Scorer, engine, planner, score, writer
from diffreward.scoring.decode import Decoder, to_float

FORK = multiprocessing.get_context("fork")
LOG = "computed"  # one byte for each sample that `Brightness` was given


class Brightness:
    """Mean of the pixels, of each colour as a part; keeps count, and fails where it is told to."""

    def __init__(self, fail=lambda samples: None, name="brightness", pause=0.0, **info):
        self.info = RewardInfo(name, modality="image", **info)
        self.fail, self.pause = fail, pause

    def __call__(self, samples):
        time.sleep(self.pause)
        with open(LOG, "ab") as file:
            file.write(b"." * len(samples))
        self.fail(samples)
        colours = samples.data.mean(dim=(2, 3))
        return Scores(
            colours.mean(dim=1), colours.std(dim=1), dict(zip("rgb", colours.T, strict=True))
        )


class Prepared:
    """The same of resized pixels, as a reward with a tower has it."""

    preprocess = Preprocess((16, 16), (0.0,) * 3, (1.0,) * 3)

    def __init__(self, name="prepared"):
        self.info, self.seen = RewardInfo(name, modality="image"), []

    def __call__(self, samples):
        return self.score_prepared(self.preprocess(samples.data), samples.prompts)

    def score_prepared(self, prepared, prompts=None):
        self.seen.append(prepared)
        return Scores(prepared.mean(dim=(1, 2, 3)))


def computed() -> int:
    return os.path.getsize(LOG) if os.path.exists(LOG) else 0


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


# -- numbers ------------------------------------------------------------------------------------


def test_rows_are_those_of_the_files_in_order(here):
    folder_of(here / "f", 30)
    found = score("f", ["colorfulness", Brightness(), Prepared()], batch_size=7)
    files = sorted(str(path) for path in Path("f").rglob("*.png"))
    assert found.table["id"].to_pylist() == found.table["path"].to_pylist() == files
    truth = np.array([pixels(int(Path(f).stem), height=24 + 8 * (int(Path(f).stem) % 2)).mean()
                      for f in files]) / 255  # fmt: skip
    np.testing.assert_allclose(found["brightness"], truth, atol=1e-6)
    np.testing.assert_allclose(found["prepared"], truth, atol=0.02)  # resized
    for n in (0, 17):
        image = to_float(np.array(picture_of(files[n]))[None])
        expected = evaluate(make_reward("colorfulness"), Samples(image, "image")).value.item()
        assert found["colorfulness"][n] == pytest.approx(expected, rel=1e-5)
    names = ["id", "path", "prompt", "colorfulness", "brightness", "brightness_std"]
    names += ["brightness.b", "brightness.g", "brightness.r", "prepared", "error", "notes"]
    assert found.table.column_names == names
    assert found.errors == [] and found.computed == 30


def picture_of(file):
    n = int(Path(file).stem)
    return picture(n, height=24 + 8 * (n % 2))


def test_neighbours_and_workers_make_no_difference(here):
    folder_of(here / "f", 10, broken=2)
    rewards = ["clip_score", Prepared(), "colorfulness"]
    tables = [
        score("f", rewards, prompts="a red heart", batch_size=size, num_workers=workers).table
        for size, workers in [(7, 1), (32, 0)]
    ]
    for table in tables[1:]:
        assert table["error"] == tables[0]["error"] and table["id"] == tables[0]["id"]
        for name in ("clip_score", "prepared", "colorfulness"):
            ours, theirs = (t[name].to_numpy(zero_copy_only=False) for t in (table, tables[0]))
            np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1e-5)


def test_clip_score_is_that_of_the_library(here):
    picture(3).save("a.png")
    picture(5, height=64).save("b.png")
    Path("m.csv").write_text("path,prompt\na.png,a red heart\nb.png,blue star\n")
    found = score("m.csv", "clip_score")
    reward = make_reward("clip_score")
    for n, (file, prompt) in enumerate([("a.png", "a red heart"), ("b.png", "blue star")]):
        image = to_float(pixels(*((3, 24) if file == "a.png" else (5, 64)))[None])
        expected = evaluate(reward, Samples(image, "image", [prompt])).value.item()
        assert found["clip_score"][n] == pytest.approx(expected, abs=1e-5)


def test_summary():
    values = np.linspace(0, 1, 21, dtype=np.float32)
    images = torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4)
    found = score(Samples(images, "image"), Brightness())
    expected = {"count": 21, "errors": 0, "mean": 0.5, "std": np.std(values), "p5": 0.05,
                "p50": 0.5, "p95": 0.95}  # fmt: skip
    assert found.summary()["brightness"] == pytest.approx(expected, abs=1e-6)


def test_infinite_scores_are_legal_and_survive_every_format(here):
    folder_of(here / "f", 3)

    def constraint(samples):
        return torch.where(samples.data.mean(dim=(1, 2, 3)) > -1, -torch.inf, 0.0)

    for end in (".parquet", ".jsonl", ".csv"):
        found = score("f", {"hard": constraint}, out=f"o{end}")
        assert found["hard"].tolist() == [-np.inf] * 3
        assert found.summary()["hard"]["p50"] == -np.inf
    assert '"hard": "-inf"' in Path("o.jsonl").read_text() and ",-inf," in Path("o.csv").read_text()


# -- inputs -------------------------------------------------------------------------------------


def test_the_same_twice_is_computed_once(here):
    folder_of(here / "f", 6)
    files = sorted(str(p) for p in Path("f").rglob("*.png"))
    found = score(["f", files[2], "f"], Brightness(), shard_rows=4, batch_size=3)
    assert len(found) == 13 and found.computed == computed() == 6
    assert found.table["id"].to_pylist() == [*files, files[2], *files]
    assert found["brightness"][6] == found["brightness"][2] == found["brightness"][9]


def test_manifest_columns_are_kept_and_given_as_context(here):
    for n in range(3):
        picture(n).save(f"{n}.png")
    rows = [
        {"path": "0.png", "prompt": "x", "target": 0.5, "tags": ["a"], "error": "theirs"},
        {"path": "1.png", "prompt": None, "target": None, "tags": None, "error": None},
        {"path": "2.png", "prompt": "z", "target": 2, "tags": "b", "error": None},
    ]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Distance(Brightness):
        def __call__(self, samples):
            target = torch.tensor(samples.context["target"])
            return (samples.data.mean(dim=(1, 2, 3)) - target).abs()

    distance = Distance(name="distance", needs_context=("target",))
    judge = Brightness(name="judge", needs_prompt=True)
    found = score("m.jsonl", [distance, judge])
    rows = found.table.to_pylist()
    means = [pixels(n).mean() / 255 for n in range(3)]
    assert rows[0]["distance"] == pytest.approx(abs(means[0] - 0.5), abs=1e-6)
    assert rows[2]["distance"] == pytest.approx(abs(means[2] - 2), abs=1e-6)
    assert rows[1]["distance"] is None and rows[1]["judge"] is None
    assert rows[1]["error"] == (
        "distance: it needs target, and there is none; judge: it needs a prompt, and there is none"
    )
    assert [row["target"] for row in rows] == [0.5, None, 2.0]
    assert [row["tags"] for row in rows] == ['["a"]', None, "b"]
    assert [row["input.error"] for row in rows] == ["theirs", None, None]


def test_numbers_too_large_for_a_column_become_texts(here):
    picture(0).save("0.png")
    Path("m.jsonl").write_text(
        f'{{"path": "0.png", "seed": {2**70}}}\n{{"path": "0.png", "seed": 1}}'
    )
    found = score("m.jsonl", Brightness(), out="o.parquet")
    assert found.table["seed"].to_pylist() == [str(2**70), "1"]


def test_what_lacks_context_does_not_move_the_others(here):
    for n in range(5):
        picture(n).save(f"{n}.png")
    rows = [{"path": f"{n}.png", "target": None if n in (0, 3) else n} for n in range(5)]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def plus(samples):
        return samples.data.mean(dim=(1, 2, 3)) + torch.tensor(samples.context["target"])

    plus.info = RewardInfo("plus", modality="image", needs_context=("target",))
    found = score("m.jsonl", plus)["plus"]
    truth = [np.nan if n in (0, 3) else pixels(n).mean() / 255 + n for n in range(5)]
    np.testing.assert_allclose(found, truth, atol=1e-6)


def test_sequences_and_texts(here):
    Path("s.fasta").write_text(">a\nGGCC\n>b\nATAT\n>c\nANA\n>d\nGAT\n")

    def gc(samples):
        assert samples.data.dtype == torch.int64
        return ((samples.data == 1) | (samples.data == 2)).float().mean(dim=1)

    gc.info = RewardInfo("gc", modality="dna")
    rows = score("s.fasta", gc).table.to_pylist()
    assert [row["gc"] for row in rows] == [1.0, 0.0, None, pytest.approx(1 / 3)]
    assert "letter 2 is 'N'" in rows[2]["error"]
    Path("t.txt").write_text("a\n\nfour\n")

    def length(samples):
        return torch.tensor([float(len(text)) for text in samples.data])

    length.info = RewardInfo("length", modality="text")
    found = score("t.txt", length)
    assert found.errors == [] and found["length"].tolist() == [1, 4]


def test_samples_in_memory(here):
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red heart", "b", "c", "d", "e"]
    samples = Samples(images, "image", prompts)
    found = score(samples, ["clip_score", "colorfulness"], out="o.parquet", batch_size=2)
    for name in ("clip_score", "colorfulness"):
        truth = evaluate(make_reward(name), samples).value.numpy()
        np.testing.assert_allclose(found[name], truth, atol=1e-5, rtol=1e-5)
    assert found.table["id"].to_pylist() == list("01234")
    assert pq.read_table("o.parquet").equals(found.table)
    with pytest.raises(ValueError, match="these samples have none"):
        score(Samples(images, "image"), "clip_score")
    with pytest.raises(ValueError, match="scores image samples, but text"):
        score(Samples(["a"], "text"), "clip_score")


def test_samples_in_memory_go_on_after_an_interruption(here):
    images = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[7] = images[1]  # computed once
    context = {"target": [*range(7), 1, 8, 9]}
    samples = Samples(images, "image", ["x"] * 10, context)

    def stop(batch):
        if computed() > 6:  # in the third batch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(samples, Brightness(stop), out="o.parquet", batch_size=3)
    shards = sorted(os.listdir("o.parquet.parts"))
    others = {
        "data": Samples(images.flip(0), "image", ["x"] * 10, context),
        "prompts": Samples(images, "image", ["x"] * 9 + ["y"], context),
        "context": Samples(images, "image", ["x"] * 10, {"target": [*context["target"][:9], 0]}),
        "shape": Samples(images.reshape(10, 3, 4, 16), "image", ["x"] * 10, context),
    }
    for other in others.values():
        with pytest.raises(FileExistsError, match=r"its inputs differ"):
            score(other, Brightness(), out="o.parquet", batch_size=3)
    assert sorted(os.listdir("o.parquet.parts")) == shards
    os.remove(LOG)
    found = score(samples, Brightness(), out="o.parquet", batch_size=3)
    assert found.computed == computed() == 3
    np.testing.assert_allclose(found["brightness"], images.mean(dim=(1, 2, 3)), atol=1e-6)
    assert found["brightness"][7] == found["brightness"][1]


def test_keys_of_samples_in_memory_are_their_contents():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names = {"a": torch.arange(3.0), "b": [np.zeros(2000), np.ones(2000), "x"]}
    samples = Samples(images, "image", ["p"] * 3, names)
    keys = engine._sample_keys(samples)
    assert len(set(keys)) == 3
    again = Samples(images.clone(), "image", ["p"] * 3, dict(reversed(names.items())))
    assert engine._sample_keys(again) == keys
    assert engine._sample_keys(samples.take([2, 0])) == [keys[2], keys[0]]
    late = np.zeros(2000)
    late[1000] = 1  # not in its repr
    changed = [
        Samples(images.double(), "image", ["p"] * 3, names),
        Samples(images, "image", None, names),
        Samples(images, "video", ["p"] * 3, names),
        Samples(images, "image", ["p"] * 3, {"a": names["a"]}),
        Samples(images, "image", ["p"] * 3, {"c": names["a"], "b": names["b"]}),
        Samples(images, "image", ["p"] * 3, {**names, "b": [late, *names["b"][1:]]}),
    ]
    firsts = [engine._sample_keys(other)[0] for other in changed]
    assert len({keys[0], *firsts}) == 1 + len(changed)
    texts = engine._sample_keys(Samples(["a", "b", "a"], "text"))
    assert texts[0] == texts[2] != texts[1]


# -- what is shared -----------------------------------------------------------------------------


def test_rewards_with_one_preprocessing_get_the_same_tensor(here):
    folder_of(here / "f", 5)
    first, second = Prepared("first"), Prepared("second")
    score("f", [first, second], batch_size=3)
    assert [len(tensor) for tensor in first.seen] == [3, 2]
    assert all(a is b for a, b in zip(first.seen, second.seen, strict=True))


def test_one_tower_runs_once_for_two_rewards(here):
    folder_of(here / "f", 4)
    one, two = make_reward("clip_score"), make_reward("clip_score")
    assert one.tower is two.tower
    calls = []
    handle = one.tower.network.visual.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = score("f", {"one": one, "two": two}, prompts="a red heart")
    finally:
        handle.remove()
    assert len(calls) == 1 and np.array_equal(found["one"], found["two"])


MIXED = {
    "weighted_sum": [
        {"reward": "clip_score", "weight": 2.0},
        {"standardize": {"reward": {"product": [
            {"par": {"reward": "clip_judge", "references": {"a red heart": 0.5, "a blue ring": 0}}},
            {"clip_range": {"reward": "colorfulness", "low": 1}},
        ]}, "mean": 0.1, "std": 3.0}},
        {"uncertain": {"reward": ["sharpness", "contrast", "jpeg_compressibility"]}},
        {"uncertain": {"reward": "saturation", "source": "tta"}},
    ]
}  # fmt: skip


def test_a_combination_scores_as_if_it_were_called(here):
    images = np.stack([pixels(seed) for seed in range(6)])
    for seed in range(6):
        picture(seed).save(here / f"{seed}.png")
    prompts = ["a red heart", "a blue ring"] * 3
    found = score(".", {"all": MIXED, "alone": "clip_judge"}, prompts=prompts, batch_size=6)
    assert not found.errors
    truth = evaluate(make_reward(MIXED), Samples(to_float(images), "image", prompts))
    assert np.array_equal(found["all"], truth.value.numpy())
    assert np.array_equal(found["all_std"], truth.std.numpy())
    parts = {name for name in found.table.column_names if name.startswith("all.")}
    assert parts == {f"all.{part}" for part in truth.parts}
    for part, value in truth.parts.items():
        assert np.array_equal(found[f"all.{part}"], value.numpy()), part


def test_members_of_a_combination_are_prepared_and_encoded_with_the_others(here):
    folder_of(here / "f", 5)
    alone, member = Prepared("alone"), Prepared("member")
    both = {"weighted_sum": [member, {"clip_range": {"reward": member, "high": 1}}]}
    assert not Scorer({"a": alone, "b": both}).decoder().raw
    found = score("f", {"alone": alone, "both": both}, batch_size=3)
    assert [len(tensor) for tensor in alone.seen] == [3, 2]
    a, b = alone.seen
    assert [id(tensor) for tensor in member.seen] == [id(t) for t in (a, a, b, b)]
    assert np.array_equal(found["both"], 2 * found["alone"])
    assert Scorer({"a": alone, "c": {"weighted_sum": [member, "colorfulness"]}}).decoder().raw


def test_one_tower_runs_once_for_a_reward_and_a_combination_with_it(here):
    folder_of(here / "f", 4)
    one = make_reward("clip_score")
    half = {"weighted_sum": [{"reward": one, "weight": 0.5}, {"reward": one, "weight": 0.25}]}
    calls = []
    handle = one.tower.network.visual.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = score("f", {"one": one, "part": half}, prompts="a red heart")
    finally:
        handle.remove()
    assert len(calls) == 1
    assert np.array_equal(found["part"], np.float32(0.5) * found["one"] + found["one"] / 4)


def test_a_member_that_fails_on_one_sample_costs_that_sample(here):
    folder_of(here / "f", 9)
    dark = pixels(4).mean() / 255

    def fail(samples):
        if ((samples.data.mean(dim=(1, 2, 3)) - dark).abs() < 1e-6).any():
            raise RuntimeError("too dark")

    spec = {"weighted_sum": [{"clip_range": {"reward": Brightness(fail), "low": 0}}, "contrast"]}
    found = score("f", {"sum": spec, "contrast": "contrast"}, batch_size=9)
    ((name, error),) = found.errors
    assert name.endswith("00004.png") and error == "sum: too dark"
    assert np.isnan(found["sum"]).sum() == 1 and not np.isnan(found["contrast"]).any()


def test_a_combination_that_fails_on_one_sample_costs_that_sample(here):
    folder_of(here / "f", 6)
    prompts = ["a cat"] * 3 + ["a dog"] + ["a cat"] * 2
    spec = {"log_sigmoid": {"reward": "contrast", "reference": {"a cat": 0.1}}}
    found = score("f", {"judged": spec}, prompts=prompts, batch_size=6)
    ((name, error),) = found.errors
    assert name == found.table["id"][3].as_py()
    assert "judged: log_sigmoid has no reference for the prompt of sample 0" in error
    assert np.isnan(found["judged"]).sum() == 1


def test_raw_pixels_are_decoded_only_if_somebody_wants_them():
    assert not Scorer([Prepared()]).decoder().raw
    assert Scorer([Prepared(), "colorfulness"]).decoder().raw


# -- failures cost a row ------------------------------------------------------------------------


def test_a_reward_that_fails_on_one_sample_costs_that_sample(here):
    folder_of(here / "f", 20)
    dark = pixels(4).mean() / 255

    def fail(samples):
        bad = (samples.data.mean(dim=(1, 2, 3)) - dark).abs() < 1e-6
        if bad.any():
            raise RuntimeError("too\ndark")

    found = score("f", [Brightness(fail), "colorfulness"], batch_size=16)
    ((name, error),) = found.errors
    assert name.endswith("00004.png") and error == "brightness: too dark"
    assert np.isnan(found["brightness"]).sum() == 1
    assert not np.isnan(found["colorfulness"]).any()
    assert computed() < 20 + 16 * 3  # halves, not one by one from the start


def test_nan_is_an_error_and_never_zero(here):
    folder_of(here / "f", 3)
    found = score("f", {"odd": lambda s: torch.tensor([float("nan")] * len(s))}, batch_size=2)
    assert found.table["odd"].null_count == 3
    assert all("odd: reward" in error and "nan" in error for _, error in found.errors)


def test_a_reward_sees_prompts_of_all_samples_or_none(here):
    for n in range(4):
        picture(n).save(f"{n}.png")
    Path("m.csv").write_text("path,prompt\n0.png,a\n1.png,\n2.png,c\n3.png,\n")
    seen = []

    def watch(samples):
        seen.append(samples.prompts)
        return samples.data.mean(dim=(1, 2, 3))

    found = score("m.csv", {"mean": watch})
    assert seen == [["a", "c"], None]
    truth = [pixels(n).mean() / 255 for n in range(4)]
    np.testing.assert_allclose(found["mean"], truth, atol=1e-6)


def test_a_part_that_does_not_apply_is_null_and_no_error(here):
    for n in range(4):
        picture(n).save(f"{n}.png")

    def half(samples):
        value = samples.data.mean(dim=(1, 2, 3))
        part = torch.where(torch.arange(len(value)) % 2 == 0, value, torch.nan)
        return Scores(value, parts={"even": part})

    found = score("*.png", {"half": half})
    assert found.errors == []
    assert found.table["half.even"].is_valid().to_pylist() == [True, False, True, False]


def test_memory_is_found_by_halving(here):
    folder_of(here / "f", 12)

    def fail(samples):
        if len(samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found = score("f", Brightness(fail), batch_size=8)
    assert found.errors == [] and not np.isnan(found["brightness"]).any()


def test_what_always_fails_is_said_at_once(here):
    folder_of(here / "f", 3)

    def broken(samples):
        raise RuntimeError("no such thing")

    with pytest.warns(UserWarning, match="'mine' failed on all 3 rows of the first batch.*no such"):
        score("f", {"mine": broken})
    with pytest.raises(ImportError):  # not one sample's fault
        score("f", {"mine": lambda s: __import__("no_such_module")})


def test_every_broken_file_is_a_row(here):
    broken = folder_of(here / "f", 60, broken=24)
    found = score("f", [Prepared(), "colorfulness"], num_workers=1)
    assert len(found) == 60
    wrong = {os.path.abspath(name) for name, _ in found.errors}
    assert wrong == {os.path.abspath(name) for name in broken} and len(broken) == 24
    for name in ("prepared", "colorfulness"):
        assert np.isnan(found[name]).sum() == 24
        assert not (found[name] == 0).any()


class Deadly(Decoder):
    """Dies of some files, as a decoder in C may."""

    def _read(self, item):
        if item.file.endswith(("00003.png", "00031.png", "00032.png")):
            os._exit(11)
        return super()._read(item)


def test_a_file_that_kills_its_decoder_is_a_row(here, monkeypatch):
    folder_of(here / "f", 40)
    healthy = score("f", Prepared())
    monkeypatch.setattr(planner, "Decoder", Deadly)
    found = score("f", Prepared(), batch_size=8, num_workers=1, out="o.parquet")
    names = [os.path.basename(name) for name in found.table["id"].to_pylist()]
    deadly = [n for n, name in enumerate(names) if name[3:5] in ("03", "31", "32")]
    assert len(deadly) == len(found.errors) == 3
    assert {error for _, error in found.errors} == {"it kills the process that decodes it"}
    expected = healthy["prepared"].copy()
    expected[deadly] = np.nan
    np.testing.assert_allclose(found["prepared"], expected, atol=1e-6)


def test_a_deadly_file_costs_one_run_of_a_few_files_and_not_the_next(here, monkeypatch):
    folder_of(here / "f", 8)
    monkeypatch.setattr(planner, "Decoder", Deadly)
    child = FORK.Process(target=score, args=("f", Prepared()), kwargs={"out": "o.parquet"})
    child.start()
    child.join()
    assert child.exitcode == 11  # so few are decoded without workers
    found = score("f", Prepared(), out="o.parquet")
    ((name, error),) = found.errors
    assert name.endswith("00003.png") and "kills the process" in error and len(found) == 8


def test_a_deadly_file_does_not_end_the_search_for_a_batch_size(here):
    class OnGpu(Scorer):
        def decoder(self):
            return Deadly("image")

        def find_batch_size(self, items):
            tried.append([Path(item.file).name for item in items])
            return 1

    folder_of(here / "f", 6)
    items = engine.Inputs(["f"]).first(8)
    names = [Path(item.file).name for item in items]
    scorer, tried = OnGpu("colorfulness"), []
    scorer.device = torch.device("cuda")
    for num_workers in (None, 2, 0):
        engine._Local(num_workers).find_batch_size(scorer, items)
    safe = [name for name in names if name != "00003.png"]
    assert len(safe) == 5 and tried == [safe, safe, names]  # no process, no safety


class Unlucky(Decoder):
    """Dies once, of nothing that is in the files."""

    def _read(self, item):
        if item.file.endswith("00003.png") and not os.path.exists("died"):
            Path("died").touch()
            os._exit(9)
        return super()._read(item)


def test_a_decoder_that_dies_of_no_file_stops_the_run_and_says_so(here, monkeypatch):
    folder_of(here / "f", 12)
    monkeypatch.setattr(planner, "Decoder", Unlucky)
    with pytest.raises(RuntimeError, match=r"lower num_workers or batch_size.*goes on where"):
        score("f", Brightness(), batch_size=4, num_workers=1, out="o.parquet")
    found = score("f", Brightness(), batch_size=4, num_workers=1, out="o.parquet")
    assert len(found) == 12 and found.errors == []


# -- output, and going on -------------------------------------------------------------------------


@pytest.mark.parametrize("end", [".parquet", ".jsonl", ".csv"])
def test_formats_hold_the_same(here, end):
    folder_of(here / "f", 9, broken=2)
    picture(1).convert("CMYK").save("f/ink ☕.tif")
    found = score("f", [Brightness(), "colorfulness"], out=f"o{end}", prompts='one, "two"\nthree')
    rows = found.table.to_pylist()
    assert rows[0]["notes"] == "CMYK" and len(rows) == 10
    if end == ".parquet":
        written = pq.read_table("o.parquet").to_pylist()
    elif end == ".jsonl":
        written = [json.loads(line) for line in Path("o.jsonl").read_text("utf-8").splitlines()]
    else:
        options = pyarrow.csv.ParseOptions(newlines_in_values=True)
        convert = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
        written = pyarrow.csv.read_csv("o.csv", parse_options=options, convert_options=convert)
        written = written.to_pylist()
    assert len(written) == len(rows)
    for ours, theirs in zip(written, rows, strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            if isinstance(value, float):
                assert np.float32(ours[name]) == np.float32(value)
            else:
                assert ours[name] == value
    assert sorted(os.listdir()) == [LOG, "f", f"o{end}"]


def run_until(check, *args, **options):
    """`score` in a process of its own, killed as soon as ``check()``; whether it was."""
    child = FORK.Process(target=score, args=args, kwargs=options)
    child.start()
    while child.is_alive() and not check():
        time.sleep(0.002)
    killed = child.is_alive()
    if killed:
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return killed


def shards_of(out):
    """Finished shards; those being written have a dot in front."""
    return list(Path(f"{out}.parts").glob("[0-9a-f]*.parquet"))


def torture(here, count, broken, shard_rows, batch_size, pause):
    names = folder_of(here / "f", count, broken)
    picture(1).save("f/twice.png")
    inputs = ["f", "f/twice.png"]
    rewards = [Brightness(pause=pause), Prepared(), "colorfulness"]
    options = {"shard_rows": shard_rows, "batch_size": batch_size, "num_workers": 1}
    whole = score(inputs, rewards, out="whole.parquet", **options)
    assert len(whole) == count + 2 and whole.computed == count + 1
    assert len(whole.errors) == len(names) == broken
    os.remove(LOG)

    shards = -(-count // shard_rows)
    for part in (0.2, 0.45, 0.7):  # three kills
        there = lambda: len(shards_of("o.parquet")) >= part * shards  # noqa
        assert run_until(there, inputs, rewards, out="o.parquet", **options)
        assert not os.path.exists("o.parquet")
    before = computed()
    kept = sum(pq.read_metadata(p).num_rows for p in shards_of("o.parquet"))
    found = score(inputs, rewards, out="o.parquet", **options)
    assert found.computed == count + 1 - kept  # what was there is not computed again
    assert computed() - before <= found.computed
    assert computed() <= count + 1 + 3 * (shard_rows + batch_size)
    assert found.table.equals(whole.table)
    assert Path("o.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert not os.path.exists("o.parquet.parts")


def test_three_kills_change_nothing(here):
    torture(here, 300, 24, shard_rows=16, batch_size=8, pause=0.03)  # time enough to be killed


def test_three_kills_change_nothing_in_ten_thousand_files(here):
    torture(here, 10_000, 500, shard_rows=128, batch_size=32, pause=0.0)


@pytest.mark.parametrize("moment", ["writing a shard", "writing the output", "tidying up"])
def test_killed_at_the_worst_moment(here, moment, monkeypatch):
    folder_of(here / "f", 20)
    options = {"shard_rows": 8, "batch_size": 4}
    score("f", "colorfulness", out="whole.parquet", **options)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(table, path):
        path.write_bytes(b"PAR1 half of it")
        if moment == "writing the output" or len(list(path.parent.glob("[0-9a-f]*.parquet"))) == 1:
            die()
        write(table, path)

    write = pq.write_table
    with monkeypatch.context() as patch:
        if moment == "tidying up":
            patch.setattr(writer.shutil, "rmtree", die)
        elif moment == "writing the output":
            patch.setitem(writer._WRITE, ".parquet", write_half)
        else:
            patch.setattr(writer.pq, "write_table", write_half)
        run_until(lambda: False, "f", "colorfulness", out="o.parquet", **options)
    assert os.path.exists("o.parquet.parts")
    found = score("f", "colorfulness", out="o.parquet", **options)
    assert found.computed == {"writing a shard": 12, "tidying up": 0}.get(moment, 0)
    assert Path("o.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert not os.path.exists("o.parquet.parts")


def interrupted(here, **options):
    """A run that stopped after its first shard."""
    folder_of(here / "f", 20)
    there = lambda: list(Path("o.parquet.parts").glob("[0-9a-f]*.parquet"))  # noqa: E731
    reward = Brightness(pause=0.1)
    options = {"shard_rows": 4, "batch_size": 4} | options
    assert run_until(there, "f", reward, out="o.parquet", **options)


def test_new_files_join_an_interrupted_run(here):
    interrupted(here)
    kept = sum(pq.read_metadata(p).num_rows for p in shards_of("o.parquet"))
    picture(99).save("f/part-0/00000a.png")
    found = score("f", Brightness(pause=0.1), out="o.parquet", shard_rows=4, batch_size=4)
    assert len(found) == 21 and found.computed == 21 - kept and found.errors == []


def test_an_interrupted_run_goes_on_with_its_batch_size(here):
    interrupted(here, batch_size=3)
    found = score("f", Brightness(pause=0.1), out="o.parquet", shard_rows=4)
    assert found.batch_size == 3 and len(found) == 20
    assert score("f", Brightness(), shard_rows=40).batch_size == 32
    assert score("f", Brightness(), shard_rows=10).batch_size == 10


def test_another_request_is_refused_and_nothing_is_lost(here):
    interrupted(here)
    before = sorted(os.listdir("o.parquet.parts"))
    with pytest.raises(FileExistsError, match=r"unfinished results .*\(its rewards differ\)"):
        score("f", "colorfulness", out="o.parquet")
    with pytest.raises(FileExistsError, match="its inputs differ"):
        score("f/part-0", Brightness(), out="o.parquet")
    with pytest.raises(FileExistsError, match="its prompts differ"):
        score("f", Brightness(), out="o.parquet", prompts="x")
    with pytest.raises(FileExistsError, match="its columns differ"):
        score("f", Brightness(), out="o.parquet", prompt_column="x")
    assert sorted(os.listdir("o.parquet.parts")) == before


def test_other_weights_under_the_same_path_are_another_request(here):
    folder_of(here / "f", 20)
    save_open_clip(here / "model")
    spec = {"clip_score": {"model": f"local-dir:{here}/model"}}
    weights = here / "model" / "open_clip_model.safetensors"

    def stop(samples):
        if os.path.exists("stop") and computed() > 10:
            raise KeyboardInterrupt

    def run(built):
        clip = make_reward(spec) if built else spec
        return score("f", {"clip": clip, "mine": Brightness(stop)}, out="o.parquet", prompts="a",
                     shard_rows=4, batch_size=4)  # fmt: skip

    for built in (False, True):
        Path("stop").touch()
        with pytest.raises(KeyboardInterrupt):
            run(built)
        os.remove("stop")
        before = weights.read_bytes()
        stamp = weights.stat()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        with pytest.raises(FileExistsError, match=r"\(its weights differ\)"):
            run(built)
        weights.write_bytes(before)  # the same, with another date: as on another machine
        found = run(built)
        assert found.computed == 12 and found.errors == []
        os.remove("o.parquet")
        os.remove(LOG)


def test_texts_of_specs_that_may_be_paths():
    spec = {"a": [{"name": "x", "head": Path("h.pt")}, 3, None], "b": "c + d"}
    assert list(engine._texts(spec)) == ["x", "h.pt", "c", "d"]


def test_what_is_there_is_never_overwritten(here):
    folder_of(here / "f", 2)
    Path("o.csv").write_text("mine")
    with pytest.raises(FileExistsError, match="never overwritten"):
        score("f", Brightness(), out="o.csv")
    assert Path("o.csv").read_text() == "mine" and computed() == 0


def test_batches_may_come_back_in_any_order(here, monkeypatch):
    folder_of(here / "f", 12)
    options = {"shard_rows": 6, "batch_size": 2}
    score("f", Brightness(), out="whole.parquet", **options)
    scored = engine._Local.scored
    monkeypatch.setattr(
        engine._Local, "scored", lambda *args: (each for each in [*scored(*args)][::-1])
    )
    found = score("f", Brightness(), out="o.parquet", **options)
    assert found.table.equals(pq.read_table("whole.parquet"))
    files = found.table["path"].to_pylist()
    truth = [np.asarray(picture_of(file)).mean() / 255 for file in files]
    np.testing.assert_allclose(found["brightness"], truth, atol=1e-6)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are not listed here")
def test_no_file_stays_open(here):
    folder_of(here / "f", 4)
    score("f", Brightness(), out="first.csv")
    before = len(os.listdir("/proc/self/fd"))
    for n in range(3):
        score("f", Brightness(), out=f"{n}.csv")
    with pytest.raises(FileExistsError):
        score("f", Brightness(), out="2.csv")
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_processes_do_not_work_on_one_output(here):
    folder_of(here / "f", 8)
    slow = Brightness(pause=0.3)
    child = FORK.Process(
        target=score, args=("f", slow), kwargs={"out": "o.csv", "shard_rows": 1, "batch_size": 1}
    )
    child.start()
    while not os.path.exists("o.csv.parts/request.json"):
        time.sleep(0.01)
    with pytest.raises(FileExistsError, match="another process is scoring"):
        score("f", slow, out="o.csv")
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(score("f", slow, out="o.csv", shard_rows=8)) == 8  # the lock died with it


# -- streams and several processes ----------------------------------------------------------------


def test_scoring_starts_before_everything_is_listed(here, monkeypatch):
    for n in range(4):
        picture(n).save(f"{n}.png")
    Path("m.jsonl").write_text(
        "".join(f'{{"path": "{n % 4}.png", "n": {n}}}\n' for n in range(400))
    )
    listed = []
    key = engine.Item.key
    monkeypatch.setattr(
        engine.Item, "key", lambda self, context=(): listed.append(1) or key(self, context)
    )

    class Watch(Brightness):
        def __call__(self, samples):
            seen.append(len(listed))
            return super().__call__(samples)

    seen = []
    found = score(
        "m.jsonl", Watch(needs_context=("n",)), shard_rows=50, batch_size=50, num_workers=0
    )
    assert seen[0] == 50 and len(seen) == 8 and len(found) == 400


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_work(here, order, monkeypatch):
    folder_of(here / "f", 30, broken=5)
    options = {"shard_rows": 4, "batch_size": 3}
    alone = score(["f", "f"], [Brightness(), Prepared()], out="alone.parquet", **options)
    os.remove(LOG)
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # as launchers do
    found = []
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        found.append(score(["f", "f"], [Brightness(), Prepared()], out="o.parquet", **options))
    assert [each.table is None for each in found] == [True, True, False]
    assert sum(each.computed for each in found) == alone.computed == 30
    assert all(each.computed for each in found)
    assert Path("o.parquet").read_bytes() == Path("alone.parquet").read_bytes()
    with pytest.raises(ValueError, match="3 processes share this work"):
        score("f", Brightness())


def test_a_scorer_travels_to_other_processes(here):
    folder_of(here / "f", 3)
    items = engine.Inputs(["f"]).first(3)
    scorer = Scorer({"mine": "colorfulness"})
    rows = scorer(items)
    assert pickle.loads(pickle.dumps(scorer))(items) == rows and len(pickle.dumps(scorer)) < 1000


# -- what is refused before anything is computed ------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "rewards", "options", "message"),
    [
        ("f", "colourfulness", {}, "did you mean"),
        ("f", [], {}, "at least one reward"),
        ("gone", "colorfulness", {}, "gone does not exist"),
        ("empty", "colorfulness", {}, "nothing to score in empty"),
        ("f", "clip_score", {}, "x.txt beside it"),
        ("f", Brightness(), {"out": "o.xlsx"}, "the output is .parquet, .jsonl, .csv"),
        ("f", Brightness(), {"batch_size": 0}, "batch_size must be at least 1"),
        ("f", Brightness(), {"num_workers": -1}, "num_workers must be at least 0"),
        ("f", Brightness(), {"engine": "spark"}, "engine is 'local' or 'ray', but 'spark' came"),
        ("f", Brightness(), {"prompts": ["a"]}, "1 prompts came for 2 inputs"),
        ("f/part-0/00000.png", Brightness(), {"out": "file/o.csv"}, "choose another output"),
    ],
)
def test_refused(here, inputs, rewards, options, message):
    folder_of(here / "f", 2)
    os.mkdir("empty")
    Path("file").touch()
    with pytest.raises((ValueError, OSError), match=message):
        score(inputs, rewards, **options)
    assert sorted(os.listdir()) == ["empty", "f", "file"]


def test_rewards_of_different_kinds_are_refused(here):
    def length(samples):
        return torch.zeros(len(samples))

    length.info = RewardInfo("length", modality="text")
    folder_of(here / "f", 2)
    with pytest.raises(ValueError, match="clip_score scores image, length scores text"):
        score("f", ["clip_score", length])
    with pytest.raises(ValueError, match="expected .txt files"):
        score("f/part-0/00000.png", length)


def test_columns_are_told_apart(here):
    folder_of(here / "f", 2)
    rewards = [Brightness(), Brightness(), {"name": "jpeg_compressibility", "quality": 50}]
    found = score("f", [*rewards, "jpeg_compressibility", Brightness(name="error")])
    names = [n for n in found.table.column_names if "." not in n and "_std" not in n]
    assert names == ["id", "path", "prompt", "brightness", "brightness 2", "jpeg_compressibility",
                     "jpeg_compressibility 2", "error 2", "error", "notes"]  # fmt: skip


def test_share_towers_is_left_as_it_was(here):
    folder_of(here / "f", 2)
    with share_towers():
        score("f", "colorfulness")


@pytest.mark.parametrize(
    "error",
    [EOFError(), ConnectionResetError(), RuntimeError("DataLoader worker (pid 7) is killed")],
)
def test_a_worker_may_die_in_several_ways(error):
    def loader():
        yield 1
        raise error

    batches = loader()
    assert engine._next(batches) == 1
    assert isinstance(engine._next(batches), engine._Death)
    assert engine._next(iter([])) is None
    with pytest.raises(RuntimeError, match="of the reward"):
        engine._next(map(lambda _: (_ for _ in ()).throw(RuntimeError("of the reward")), [1]))
