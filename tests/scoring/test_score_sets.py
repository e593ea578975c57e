"""Rewards of sets beside ordinary ones: one value for all inputs, whatever happens on the way."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from picture_files import folder_of, picture, pixels

from diffreward.cli import main
from diffreward.rewards import RewardInfo, SetReward, evaluate_set, exemplars, make_reward
from diffreward.rewards.distribution import Frechet
from diffreward.rewards.encoders import make_encoder, register_encoder
from diffreward.rewards.gaussians import Gaussian
from diffreward.rewards.kernels import Vendi
from diffreward.samples import Samples
from diffreward.scoring import score, sets
from diffreward.scoring.decode import to_float

LOG = "embedded"  # one byte for each sample that `colours` was given
FAIL: list = []  # called with the samples

INSTANCE = ["colorfulness", "contrast"]


def colours(samples):
    """Means and spreads of the colours: six numbers."""
    with open(LOG, "ab") as file:
        file.write(b"." * len(samples))
    for fail in FAIL:
        fail(samples)
    return torch.cat([samples.data.mean(dim=(2, 3)), samples.data.std(dim=(2, 3))], dim=1)


colours.key, colours.modality = "colours", "image"
ENCODER = make_encoder(colours)
register_encoder("test_colours", modality="image")(lambda: ENCODER)

FRECHET = {"name": "frechet", "encoder": "test_colours"}
VENDI = {"name": "vendi", "encoder": "test_colours"}
KID = {"name": "kid", "encoder": "test_colours"}


class Mean(SetReward):
    """Mean of the red, of which everything is known."""

    def __init__(self, name="mean", min_samples=2, **info):
        self.info = RewardInfo(name, modality="image", of_sets=True, **info)
        self.min_samples = min_samples

    def features(self, samples):
        return colours(samples)[:, :1]

    def value(self, features):
        return features.double().mean()


def embedded() -> int:
    return os.path.getsize(LOG) if os.path.exists(LOG) else 0


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    FAIL.clear()
    return tmp_path


@pytest.fixture
def photos(here):
    (here / "photos").mkdir()
    for n in range(100, 112):
        picture(n).save(here / "photos" / f"{n}.png")
    return "photos"


def images_of(*numbers):
    return to_float(np.stack([pixels(n) for n in numbers]))


def save(folder, *numbers):
    Path(folder).mkdir(exist_ok=True)
    for n in numbers:
        picture(n).save(Path(folder, f"{n:03d}.png"), compress_level=1)


def features_by_hand(*numbers):
    images = np.stack([pixels(n).reshape(-1, 3) / 255 for n in numbers])
    return np.concatenate([images.mean(axis=1), images.std(axis=1, ddof=1)], axis=1)


def frechet_by_hand(x, y):
    cx, cy = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.linalg.eigvals(cx @ cy).astype(complex)).real.sum()
    return -(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cx) + np.trace(cy) - 2 * roots)


def vendi_by_hand(x):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(x @ x.T / len(x)).clip(1e-300)
    return np.exp(-np.sum(values * np.log(values)))


def by_reward(found):
    return {each.reward: each for each in found.sets}


# -- numbers ------------------------------------------------------------------------------------


def test_values_are_those_of_the_formulas(here, photos):
    save("f", *range(20))
    found = by_reward(score("f", [FRECHET, *INSTANCE, VENDI, Mean()], reference=photos))
    x, y = features_by_hand(*range(20)), features_by_hand(*range(100, 112))
    assert list(found) == ["frechet", "vendi", "mean"]
    assert found["frechet"].value == pytest.approx(frechet_by_hand(x, y), rel=1e-4)
    assert found["vendi"].value == pytest.approx(vendi_by_hand(x), rel=1e-5)
    assert found["mean"].value == pytest.approx(x[:, 0].mean(), rel=1e-6)
    # The jackknife of a mean is its standard error.
    spread = x[:, 0].std(ddof=1) / np.sqrt(20)
    assert found["mean"].standard_error == pytest.approx(spread, rel=1e-5)
    rest = [vendi_by_hand(np.delete(x, j, axis=0)) for j in range(20)]
    spread = np.sqrt(19 / 20 * np.sum((rest - np.mean(rest)) ** 2))
    assert found["vendi"].standard_error == pytest.approx(spread, rel=1e-3)
    assert {(v.n, v.errors, v.group, v.error) for v in found.values()} == {(20, 0, None, None)}


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1, "shard_rows": 1},
        {"batch_size": 7, "shard_rows": 16, "out": "o.parquet"},
        {"batch_size": 5, "shard_rows": 5, "num_workers": 1, "out": "o.jsonl"},
        {"batch_size": 32, "num_workers": 1},
    ],
    ids=str,
)
def test_batches_workers_and_shards_make_no_difference(here, photos, options):
    save("f", *range(23))
    rewards = [FRECHET, VENDI, {**KID, "exemplars": photos}, *INSTANCE]
    found = by_reward(score("f", rewards, reference=photos, **options))
    samples = Samples(images_of(*range(23)), "image")
    for spec in (FRECHET, VENDI, KID):
        given = spec if spec is VENDI else {**spec, "exemplars": photos}
        truth = evaluate_set(make_reward(given), samples)
        assert found[spec["name"]].value == pytest.approx(truth.total, rel=1e-6, abs=1e-8)
        assert found[spec["name"]].n == 23
        spread = truth.pseudovalues().std().item() / 23**0.5
        assert found[spec["name"]].standard_error == pytest.approx(spread, rel=1e-4)


def test_samples_in_memory(here, photos):
    images = images_of(*range(9))
    kinds = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 0])
    samples = Samples(images[[*range(9), 2]], "image", context={"kind": kinds})
    found = score(samples, [FRECHET, "contrast"], reference=photos, batch_size=4, out="o.csv")
    truth = evaluate_set(make_reward({**FRECHET, "exemplars": photos}), samples)
    (value,) = found.sets
    assert value.value == pytest.approx(truth.total, rel=1e-6) and value.n == 10
    assert found.computed == 9 and found.labels == ["contrast"]
    grouped = score(samples, Mean(), group_by="kind").sets
    assert [(each.group, each.n) for each in grouped] == [("0", 6), ("1", 4)]
    truth = images[:, 0].mean(dim=(1, 2))[[0, 2, 4, 6, 8, 2]].mean().item()
    assert grouped[0].value == pytest.approx(truth, rel=1e-6)
    with pytest.raises(ValueError, match="cannot be grouped by 'sort': their context has kind"):
        score(samples, Mean(), group_by="sort")


def test_large_sets_are_valued_from_moments_and_alike(here, photos, monkeypatch):
    save("f", *range(11))
    spec = {**FRECHET, "shrinkage": 0.1}
    monkeypatch.setattr(sets, "JACKKNIFE", 11)
    monkeypatch.setattr(sets, "JACKKNIFE_BY_VALUES", 11)
    whole = by_reward(score("f", [spec, VENDI], reference=photos))
    monkeypatch.setattr(sets, "JACKKNIFE", 10)
    monkeypatch.setattr(sets, "JACKKNIFE_BY_VALUES", 10)
    monkeypatch.setattr(sets, "LARGE", 11 * 6 - 1)

    def refuse(self, features):
        raise AssertionError("all at once")

    monkeypatch.setattr(Frechet, "value", refuse)
    monkeypatch.setattr(Frechet, "influence", refuse)
    found = by_reward(score("f", [spec, VENDI], reference=photos, out="o.parquet", shard_rows=4))
    for name in ("frechet", "vendi"):
        assert found[name].value == pytest.approx(whole[name].value, rel=1e-9), found[name]
        assert np.isnan(found[name].standard_error) and whole[name].standard_error > 0
    monkeypatch.setattr(sets, "LARGE", 11 * 6)
    (refused,) = score("f", spec, reference=photos).sets
    assert refused.error == "all at once"


def test_influence_that_takes_many_values_is_computed_of_fewer(monkeypatch):
    monkeypatch.setattr(sets, "JACKKNIFE", 12)
    monkeypatch.setattr(sets, "JACKKNIFE_BY_VALUES", 6)
    images = images_of(*range(7))
    reference = Gaussian(torch.zeros(6), torch.eye(6), 100)
    rewards = {
        "a": Frechet(ENCODER, reference),
        "b": Frechet(ENCODER, reference, shrinkage=0.1),
        "c": Frechet(ENCODER, reference, shrinkage=0.1, approximate=True),
        "d": Vendi(ENCODER, order=2),
        "e": Vendi(ENCODER, order="inf"),
        "f": Mean(),
    }
    found = by_reward(score(Samples(images, "image"), rewards))
    quick = {name for name, value in found.items() if np.isfinite(value.standard_error)}
    assert quick == {"a", "c", "d"}
    found = score(Samples(images, "image"), rewards, influence=True)
    assert all(np.isfinite(value.standard_error) for value in found.sets)
    rest = [images[[k for k in range(7) if k != j], 0].mean() for j in range(7)]
    truth = [(images[:, 0].mean() - value).item() for value in rest]
    np.testing.assert_allclose(found["f.influence"], truth, atol=1e-6)


def test_a_warning_where_there_are_fewer_samples_than_dimensions(here):
    save("f", *range(5))
    reference = Gaussian(torch.zeros(6), torch.eye(6), 100)
    with pytest.warns(UserWarning, match="covariance of 5 samples in 6 dimensions"):
        score("f", Frechet(ENCODER, reference))


# -- what is in a set ---------------------------------------------------------------------------


@pytest.mark.parametrize("out", [None, "o.parquet"])
def test_what_cannot_be_read_or_embedded_is_in_no_set(here, out):
    save("f", *range(8))
    Path("f/bad.png").touch()
    dark = images_of(4).mean()  # the first of its shard

    def fail(samples):
        if ((samples.data.mean(dim=(1, 2, 3)) - dark).abs() < 1e-6).any():
            raise RuntimeError("too dark")

    FAIL.append(fail)
    rewards = {"m": Mean(), "v": VENDI, "c": "contrast"}
    found = score("f", rewards, influence=True, shard_rows=4, out=out)
    assert [(each.reward, each.n, each.errors) for each in found.sets] == [
        ("m", 7, 2), ("v", 7, 2)
    ]  # fmt: skip
    rest = [n for n in range(8) if n != 4]
    truth = features_by_hand(*rest)
    assert found.sets[0].value == pytest.approx(truth[:, 0].mean(), rel=1e-6)
    assert found.sets[1].value == pytest.approx(vendi_by_hand(truth), rel=1e-5)
    assert found.errors == [
        ("f/004.png", "m: too dark; v: too dark"), ("f/bad.png", "the file is empty")
    ]  # fmt: skip
    influence = found["m.influence"]
    assert np.isnan(influence[[4, 8]]).all() and np.isnan(found["c"]).sum() == 1


def test_the_same_twice_is_embedded_once_and_counts_twice(here):
    save("f", *range(6))
    found = score(["f", "f/003.png", "f"], Mean(), shard_rows=4, batch_size=3, influence=True)
    red = features_by_hand(*range(6), 3, *range(6))[:, 0]
    assert embedded() == 6 and found.sets[0].n == 13
    assert found.sets[0].value == pytest.approx(red.mean(), rel=1e-6)
    left = [red.mean() - np.delete(red, j).mean() for j in range(13)]
    np.testing.assert_allclose(found["mean.influence"], left, atol=1e-6)


def test_a_column_of_a_manifest_makes_groups(here, photos):
    save("f", *range(9))
    kinds = ["b", "a", "b", None, "a", "b", "a", "b", "a"]
    rows = [{"path": f"f/{n:03d}.png", "kind": kind} for n, kind in enumerate(kinds)]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = [VENDI, FRECHET]
    options = {"reference": photos, "group_by": "kind", "influence": True}
    found = score("m.jsonl", rewards, out="o.parquet", shard_rows=2, batch_size=2, **options)
    expected = [("b", 4), ("a", 4), (None, 1)]
    assert [(v.reward, v.group, v.n) for v in found.sets] == [
        (reward, *each) for reward in ("vendi", "frechet") for each in expected
    ]
    y = features_by_hand(*range(100, 112))
    for n, group in enumerate("ba"):
        members = [n for n, kind in enumerate(kinds) if kind == group]
        x = features_by_hand(*members)
        assert found.sets[n].value == pytest.approx(vendi_by_hand(x), rel=1e-5)
        assert found.sets[3 + n].value == pytest.approx(frechet_by_hand(x, y), rel=1e-4)
        rest = [vendi_by_hand(np.delete(x, j, axis=0)) for j in range(4)]
        ours = found["vendi.influence"][members]
        np.testing.assert_allclose(ours, vendi_by_hand(x) - rest, atol=1e-5)
    alone = found.sets[5]
    assert np.isnan(alone.value) and "needs 2 samples or more, 1 came" in alone.error
    assert np.isnan(found["frechet.influence"][3]) and np.isnan(found["vendi.influence"][3])
    names = found.table.column_names
    assert names[:6] == ["id", "path", "prompt", "vendi.influence", "frechet.influence", "error"]
    assert pq.read_table("o.parquet").equals(found.table)
    assert found.errors == [] and found.table["kind"].to_pylist() == kinds


def test_folders_are_groups(here):
    save("a", 0, 1, 2)
    save("b", 3, 4, 5, 6)
    save("b/c", 7, 8)
    found = score(["a", "b"], Mean(), group_by="folder").sets
    assert [(each.group, each.n) for each in found] == [("a", 3), ("b", 4), ("b/c", 2)]
    for each, members in zip(found, [(0, 1, 2), (3, 4, 5, 6), (7, 8)], strict=True):
        truth = features_by_hand(*members)[:, 0].mean()
        assert each.value == pytest.approx(truth, rel=1e-6)
    assert found[2].n == 2 and np.isnan(found[2].standard_error)  # of two, none can be left out


# -- interruptions ------------------------------------------------------------------------------


def test_features_are_not_computed_again_after_an_interruption(here, photos):
    save("f", *range(14))
    rewards = ["contrast", FRECHET, VENDI]
    options = {"reference": photos, "batch_size": 2, "shard_rows": 4, "influence": True}
    whole = score("f", rewards, out="whole.parquet", **options)
    exemplars._RECENT.clear()  # as in a new process
    before = embedded()

    def stop(samples):
        if embedded() - before > 12 + 8:  # in the third shard; the exemplars come first
            raise KeyboardInterrupt

    FAIL.append(stop)
    with pytest.raises(KeyboardInterrupt):
        score("f", rewards, out="o.parquet", **options)
    assert len(list(Path("o.parquet.parts").glob("*.safetensors"))) == 2
    assert not os.path.exists("o.parquet") and not os.path.exists("o.parquet.sets.json")
    FAIL.clear()
    exemplars._RECENT.clear()
    before = embedded()
    found = score("f", rewards, out="o.parquet", **options)
    assert found.computed == 6 and embedded() - before == 12 + 6
    assert found.sets == whole.sets and found.table.equals(whole.table)
    assert sorted(os.listdir()) == sorted(
        ["f", "photos", LOG, "o.parquet", "o.parquet.sets.json", "whole.parquet",
         "whole.parquet.sets.json"]
    )  # fmt: skip
    ours, theirs = (Path(f"{name}.parquet.sets.json").read_text() for name in ("o", "whole"))
    assert ours == theirs


def test_an_interruption_while_sets_are_valued(here, monkeypatch):
    save("f", *range(5))

    class Stopped(Mean):
        def value(self, features):
            if FAIL:
                raise KeyboardInterrupt
            return super().value(features)

    with pytest.raises(KeyboardInterrupt):
        FAIL.append(lambda samples: None)
        score("f", Stopped(), out="o.csv")
    FAIL.clear()
    found = score("f", Stopped(), out="o.csv", group_by="folder")  # may be said later
    assert embedded() == 5 and found.computed == 0 and found.sets[0].group == "f"
    truth = features_by_hand(*range(5))[:, 0].mean()
    assert found.sets[0].value == pytest.approx(truth, rel=1e-6)


def test_other_exemplars_are_another_request(here, photos):
    save("f", *range(5))

    def stop(samples):
        if embedded() > 12 + 3:
            raise KeyboardInterrupt

    FAIL.append(stop)
    options = {"reference": photos, "batch_size": 2, "shard_rows": 2, "out": "o.csv"}
    with pytest.raises(KeyboardInterrupt):
        score("f", [FRECHET], **options)
    FAIL.clear()
    picture(200).save("photos/200.png")
    with pytest.raises(FileExistsError, match="another request"):
        score("f", [FRECHET], **options)


def test_processes_share_the_rows_and_the_last_one_values_the_sets(here, photos, monkeypatch):
    save("f", *range(10))
    whole = score("f", [FRECHET], reference=photos)
    for rank in (0, 1):
        for name, value in [("RANK", rank), ("WORLD_SIZE", 2), ("MASTER_ADDR", "localhost")]:
            monkeypatch.setenv(name, str(value))
        found = score("f", [FRECHET], reference=photos, out="o.csv", shard_rows=3)
        assert found.sets == ([] if rank == 0 else whole.sets)
    shown = json.loads(Path("o.csv.sets.json").read_text())
    assert shown["sets"] == [whole.sets[0].plain()] and "frechet" in json.dumps(shown["rewards"])


# -- beside ordinary rewards --------------------------------------------------------------------


def test_rows_do_not_change_by_a_reward_of_sets(here, photos):
    folder_of(here / "f", 24, broken=12)
    plain = score("f", INSTANCE, batch_size=5)
    found = score("f", [FRECHET, INSTANCE[0], VENDI, INSTANCE[1]], reference=photos, batch_size=5)
    assert found.table.equals(plain.table) and found.labels == plain.labels == INSTANCE
    assert found.summary() == plain.summary() and plain.sets == []
    assert [each.n + each.errors for each in found.sets] == [24, 24]
    with pytest.raises(KeyError, match="'frechet' is of sets"):
        found["frechet"]


def test_rewards_of_one_encoder_embed_once(here, photos):
    save("f", *range(6))
    rewards = {"one": Frechet(ENCODER, Gaussian(torch.zeros(6), torch.eye(6), 9)),
               "two": Vendi(ENCODER), "three": Mean()}  # fmt: skip
    found = score("f", rewards)
    assert embedded() == 12 and [each.reward for each in found.sets] == ["one", "two", "three"]
    assert all(each.error is None for each in found.sets)


def test_sequences(here):
    Path("s.fasta").write_text(">a\nGGCC\n>b\nATAT\n>c\nACGT\n>d\nGGNC\n")
    spec = {"name": "vendi", "encoder": {"kmers": {"k": 1, "modality": "dna"}}}
    (found,) = score("s.fasta", spec).sets
    assert (found.n, found.errors) == (3, 1)
    counts = np.array([[0, 2, 2, 0], [2, 0, 0, 2], [1, 1, 1, 1]]) / 4
    assert found.value == pytest.approx(vendi_by_hand(counts), rel=1e-5)


# -- refusals -----------------------------------------------------------------------------------


def test_refusals(here, photos):
    save("f", *range(4))
    cases = [
        ([FRECHET], {}, "'frechet' compares with exemplars, and there are none: give a reference"),
        ([VENDI, "contrast"], {"reference": photos}, "a reference is for.*vendi, contrast came"),
        ([{**FRECHET, "exemplars": photos}], {"reference": "f"}, "a reference is for rewards"),
        (["contrast"], {"group_by": "folder"}, "group_by is for rewards of sets, and contrast"),
        (["contrast"], {"influence": True}, "influence is for rewards of sets"),
        ([Mean()], {"group_by": "kind"}, "cannot be grouped by 'kind': they have no columns"),
        ([FRECHET], {"reference": "gone"}, "gone"),
        ([{"weighted_sum": [Mean(), "contrast"]}], {}, "'mean' is of whole sets: score it by"),
    ]
    for rewards, options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            score("f", rewards, out="o.csv", **options)
    assert not os.path.exists("o.csv.parts") and not embedded()
    Path("o.csv.sets.json").touch()
    with pytest.raises(FileExistsError, match=r"o\.csv\.sets\.json exists"):
        score("f", [Mean()], out="o.csv")


def test_a_reference_goes_to_every_reward_that_has_none(here, photos):
    save("f", *range(6))
    similar = {"name": "exemplar_similarity", "encoder": "test_colours"}
    rewards = {"a": similar, "b": FRECHET, "c": {"frechet": {**FRECHET, "exemplars": "f"}}}
    rewards["c"]["frechet"].pop("name")
    found = score("f", rewards, reference=photos)
    own = make_reward({**similar, "exemplars": photos})
    truth = own(Samples(images_of(*range(6)), "image")).value.numpy()
    np.testing.assert_allclose(found["a"], truth, atol=1e-5)
    values = {each.reward: each.value for each in found.sets}
    assert values["b"] < -1e-4 and values["c"] == pytest.approx(0, abs=1e-6)


def test_a_set_that_has_no_value_is_an_error_of_it_alone(here):
    save("f", *range(4))

    class Odd(Mean):
        def value(self, features):
            return features.double().mean() * torch.nan

    found = score("f", {"odd": Odd(), "few": Mean(min_samples=9), "mean": Mean()}, out="o.csv")
    odd, few, mean = found.sets
    assert "NaN" in odd.error and np.isnan(odd.value) and np.isnan(odd.standard_error)
    assert "needs 9 samples or more, 4 came" in few.error
    assert mean.error is None and found.errors == []
    shown = json.loads(Path("o.csv.sets.json").read_text())["sets"]
    assert shown[0]["value"] is None and shown[2]["value"] == mean.value


def test_features_of_several_shapes_make_no_set(here):
    for n in range(4):
        picture(n, height=24 + 8 * (n // 2)).save(f"{n}.png")
    reward = Vendi(lambda samples: samples.data[:, 0].flatten(1))
    with pytest.raises(ValueError, match=r"'vendi' has features float32 \(768,\) and .* \(1024,\)"):
        score("*.png", reward)
    with pytest.raises(ValueError, match="'vendi' has features .* make no set"):
        score("*.png", reward, shard_rows=2, out="o.csv")


def test_what_always_fails_is_said_at_once(here):
    save("f", 0, 1)

    def broken(samples):
        raise RuntimeError("no such thing")

    with pytest.warns(UserWarning, match="'one, two' failed on all 2 rows of the first batch"):
        encoder = make_encoder(broken)
        found = score("f", {"one": Vendi(encoder), "two": Vendi(encoder)})
    assert [each.n for each in found.sets] == [0, 0] and all(each.error for each in found.sets)


# -- the command --------------------------------------------------------------------------------


def test_the_command(here, photos, capsys):
    save("f", *range(4))
    save("g", *range(4, 9))
    Path("g/bad.png").touch()
    argv = ["score", "f", "g", "--rewards", "contrast", "frechet", "vendi"]
    assert main([*argv, "--out", "o.jsonl"]) == 2
    assert "'frechet' compares with exemplars" in capsys.readouterr().err
    argv += ["--reference", photos, "--group_by", "folder", "--influence", "true"]
    assert main([*argv, "--out", "o.jsonl"]) == 0
    out, err = capsys.readouterr()
    shown = [line.split() for line in out.splitlines()]
    assert ["contrast", "9", "1"] in [line[:3] for line in shown]
    values = json.loads(Path("o.jsonl.sets.json").read_text())["sets"]
    assert [(v["reward"], v["group"], v["n"], v["errors"]) for v in values] == [
        ("frechet", "f", 4, 0), ("frechet", "g", 5, 1), ("vendi", "f", 4, 0), ("vendi", "g", 5, 1)
    ]  # fmt: skip
    for value in values:
        numbers = [f"{value[name]:.4g}" for name in ("value", "standard_error")]
        assert [value["reward"], value["group"], str(value["n"]), str(value["errors"]),
                *numbers] in shown  # fmt: skip
    assert "covariance of 4 samples in" in err
    reward = make_reward({"frechet": photos})
    with pytest.warns(UserWarning):
        truth = evaluate_set(reward, Samples(images_of(*range(4, 9)), "image"))
    assert values[1]["value"] == pytest.approx(truth.total, rel=1e-4)
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    given = [row["frechet.influence"] for row in rows]
    np.testing.assert_allclose(given[4:9], truth.value.numpy(), rtol=1e-3, atol=1e-6)
    assert given[9] is None and "frechet" not in rows[0]


def test_the_command_shows_sets_alone_and_what_is_wrong_with_them(here, capsys):
    save("f", 0)
    assert main(["score", "f", "--rewards", "{name: vendi, encoder: test_colours}"]) == 0
    out, err = capsys.readouterr()
    assert "vendi" in out and "percentile" not in out and "p50" not in out
    assert "vendi: reward 'vendi' needs" in err or "samples" in err
    assert Path("scores.parquet.sets.json").exists()


def test_rewards_of_sets_are_listed_as_such(capsys):
    assert main(["rewards"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("frechet ")]
    assert "sets of anything" in lines[0]
    assert main(["rewards", "vendi"]) == 0
    assert "scores:    sets of anything" in capsys.readouterr().out
