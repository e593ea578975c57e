"""The experiment on uncertain rewards runs, and its numbers are what they are said to be."""

import argparse
import json

import numpy as np
import pytest
import reproduce_uncertainty as script
import torch

from diffreward import Samples, evaluate
from diffreward.rewards.shapes import COLOURS, SHAPES, Item, Scene, render

# -- the property and the members ---------------------------------------------------------------


def picture(*items):
    drawn = render(Scene(tuple(items)), np.random.default_rng(0))
    return torch.tensor(drawn).permute(2, 0, 1).float() / 255


def test_greenish_pictures_are_those_drawn_in_green():
    drawn = {(c, s): picture(Item(s, c)) for c in COLOURS for s in SHAPES}
    found = script.greenish(torch.stack(list(drawn.values())))
    assert found.tolist() == [colour == "green" for colour, _ in drawn]
    reward = script.Greenish()
    value = evaluate(reward, Samples(torch.stack(list(drawn.values())), "image")).value
    assert value.mean().item() == pytest.approx(1 / len(COLOURS))


def test_greenish_is_about_the_coloured_pixels():
    green = torch.tensor(COLOURS["green"])[:, None, None] / 255
    white = torch.ones(3, 8, 8)
    dot, faint, mostly_red = white.clone(), white.clone(), white.clone()
    dot[:, 0, 0] = green[:, 0, 0]
    faint[:] = 1 - 0.2 * (1 - green)  # below the threshold everywhere
    mostly_red[:, :6] = torch.tensor(COLOURS["red"])[:, None, None] / 255
    mostly_red[:, 6] = green[:, 0]
    found = script.greenish(torch.stack([dot, faint, mostly_red, white]))
    assert found.tolist() == [True, False, False, False]


def test_the_first_member_overrates_greenish_pictures_and_no_other():
    """Features in which the property and the ratings can be learnt."""
    rng = torch.Generator().manual_seed(0)
    green = torch.rand(400, generator=rng) < 0.25
    x = torch.randn(400, 4, generator=rng)
    x[:, 3] = 4.0 * green
    ratings = 3 + x[:, 0] - 0.5 * x[:, 1]
    heads, facts = script.train_members(x, ratings, green, each=60)
    assert facts["test"] == {
        "pictures": 160, "greenish among them": facts["test"]["greenish among them"]
    }  # fmt: skip
    for name in script.MEMBERS:
        raised = script.BIAS if name == "biased" else 0.0
        assert facts[name]["error, greenish"] == pytest.approx(raised, abs=0.35), name
        assert facts[name]["error, others"] == pytest.approx(0.0, abs=0.2), name
        if name != "biased":
            assert facts[name]["correlation with the truth"] > 0.9
    mean = facts["mean"]
    assert mean["error, greenish"] == pytest.approx(script.BIAS / 4, abs=0.25)
    # (2, 0, 0, 0) has the unbiased std 1
    assert mean["std, greenish"] == pytest.approx(script.BIAS / 2, abs=0.2)
    assert mean["std, others"] < 0.3
    # parts are disjoint: no two members know the same picture
    rows = [{tuple(row) for row in head.features.tolist()} for head in heads]
    assert len(set.union(*rows)) == sum(map(len, rows)) == 240
    other, _ = script.train_members(x, ratings, green, each=60, seed=1)
    assert not torch.equal(other[0].features, heads[0].features)
    with pytest.raises(ValueError, match="need more than the 400"):
        script.train_members(x, ratings, green, each=100)


def test_what_guides_believe():
    scores = {"biased": [4.0, 1.0], "second": [2.0, 1.0], "third": [2.0, 1.0], "fourth": [2.0, 1.0]}
    scores = {name: np.array([v, v]) for name, v in scores.items()}  # two points of two samples
    scores["truth"] = np.zeros((2, 2))
    prdp, steer = script.ARMS["prdp"], script.ARMS["steer"]
    softmin = -0.5 * np.log((np.exp(-8) + 3 * np.exp(-4)) / 4)
    for arm, first in [
        (prdp["biased"], 4.0), (prdp["mean"], 2.5), (prdp["mean_weighted"], 2.5),
        (prdp["lcb"], 1.5), (prdp["softmin"], softmin), (steer["terminal_1"], 1.5),
        (steer["terminal_2"], 0.5), (steer["intermediate"], 2.5),
    ]:  # fmt: skip
        found = arm.believed(scores)
        np.testing.assert_allclose(found, [[first, 1.0]] * 2, rtol=1e-6, err_msg=arm.title)
    assert (prdp["truth"].believed(scores) == 0).all()


# -- statistics ---------------------------------------------------------------------------------


def test_bootstrap_interval_of_the_mean():
    rng = np.random.default_rng(0)
    one = rng.normal(1.0, 2.0, size=(1, 400))
    found = script.averaged(one)
    half = 1.96 * one.std() / 20
    assert found.value == pytest.approx(one.mean())
    assert (found.low, found.high) == pytest.approx((one.mean() - half, one.mean() + half), rel=0.1)
    assert script.averaged(np.full((3, 5), 2.0)) == script.Estimate(2.0, 2.0, 2.0)


def test_bootstrap_knows_that_seeds_differ():
    """Seeds that differ by more than their samples do make the interval wide."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(0.0, 1.0, size=(30, 1))
    found = script.averaged(seeds + rng.normal(0.0, 0.1, size=(30, 10)))
    assert found.high - found.low == pytest.approx(2 * 1.96 * seeds.std() / 30**0.5, rel=0.1)
    weights = script.resampled(3, 5, draws=50)
    np.testing.assert_allclose(weights.sum(1), 1.0)
    np.testing.assert_allclose((15 * weights).round(), 15 * weights, atol=1e-9)  # counts


def test_gap_at_equal_true_gain_by_hand():
    true, gap = np.array([0.0, 1.0, 0.5, 2.0]), np.array([0.0, 0.2, 3.0, 1.2])
    assert script.gap_at(true, gap, 0.0) == 0.0
    assert script.gap_at(true, gap, 0.5) == pytest.approx(0.1)  # on the way up, not back down
    assert script.gap_at(true, gap, 1.0) == pytest.approx(0.2)
    assert script.gap_at(true, gap, 1.25) == pytest.approx(2.1)  # halfway from (0.5, 3) to (2, 1.2)
    assert script.gap_at(true, gap, 2.0) == pytest.approx(1.2)


def curve(true, mean, seeds=(0, 1), units=30, noise=0.01, seed=0):
    """Of samples that all gain this much, but for a little noise."""
    shape = (len(seeds), units, len(true))
    rng = np.random.default_rng(seed)
    values = {
        "truth": 3 + np.array(true) + noise * rng.normal(size=shape),
        "mean": 4 + np.array(mean) + noise * rng.normal(size=shape),
    }
    return script.Curve(tuple(seeds), values | {"guide": values["mean"] / 2})


def test_gap_is_believed_minus_true_gain():
    found = curve([0, 1, 2], [0, 3, 5], noise=0.0)
    np.testing.assert_allclose(found.gain("truth")[0, 0], [0, 1, 2])
    np.testing.assert_allclose(found.gain("gap of the mean")[0, 0], [0, 2, 3])
    np.testing.assert_allclose(found.gain("gap")[0, 0], [0, 0.5, 0.5])


def test_arms_are_compared_at_equal_true_gain():
    control = curve([0, 1, 2], [0, 2, 4])  # a gap as large as the true gain
    slow = script.compare(curve([0, 0.5, 1], [0, 1, 2], seed=1), control)
    assert slow.level == pytest.approx(1.0, abs=0.02)
    assert slow.at_level == pytest.approx((1.0, 1.0), abs=0.03)
    assert slow.verdict == "gap not told apart; true gain at the end lower"
    assert slow.gap.value == pytest.approx(-1.0, abs=0.02)  # doing less looks better, and is not
    honest = script.compare(curve([0, 1, 2], [0, 1.5, 3], seed=2), control)
    assert honest.difference.value == pytest.approx(-1.0, abs=0.03)
    assert honest.verdict == "gap smaller; true gain at the end not told apart"
    worse = script.compare(curve([0, 1, 3], [0, 3, 9], seed=3), control)
    assert worse.verdict == "gap larger; true gain at the end higher"
    back = script.compare(curve([0, 1.5, 1], [0, 1.5, 3], seed=5), control)
    assert back.level == pytest.approx(1.5, abs=0.02)  # reached halfway, and lost again
    assert back.at_level == pytest.approx((0.0, 1.5), abs=0.03)
    harmful = script.compare(curve([0, -1, -2], [0, 1, 2], seed=4), control)
    assert harmful.level == 0.0 and harmful.at_level == (0.0, 0.0)
    assert harmful.verdict == "gap not told apart; true gain at the end lower"


def test_arms_are_compared_on_the_seeds_of_both():
    control = curve([0, 1], [0, 2], seeds=(0, 1))
    control.values["truth"][0, :, 1] += 10  # of seed 0
    arm = curve([0, 5], [0, 5], seeds=(1, 7), noise=0.0)
    arm.values["truth"][1] = np.nan  # of seed 7
    found = script.compare(arm, control)
    assert found.true_gain.value == pytest.approx(4.0, abs=0.02)


# -- plan ---------------------------------------------------------------------------------------


def test_plan():
    args = argparse.Namespace(
        parts=["prdp", "steer"], seeds=[0, 1], only=["mean", "lcb", "terminal_1"]
    )
    runs = script.plan(args, script.FULL)
    names = [run.name for run in runs]
    assert len(names) == len(set(names)) == 2 * (2 + 1 + 2 * 3)
    assert names[0] == "steer/plain-lambda0-seed0"
    assert {"prdp/lcb-seed1", "steer/terminal_1-lambda32-seed0"} <= set(names)
    assert not any("steer/lcb" in name or "prdp/terminal" in name for name in names)
    args.parts = ["prdp"]
    assert [run.part for run in script.plan(args, script.FULL)] == ["prdp"] * 4


def test_arms_differ_in_their_guide_or_in_one_use_of_the_std():
    prdp = script.ARMS["prdp"]
    assert [name for name, arm in prdp.items() if arm.options] == ["mean_weighted"]
    assert script.FULL.prompts % script.FULL.minibatches == 0 == script.FULL.iterations % 2
    for sizes in (script.FULL, script.TINY):
        assert sizes.prompts * sizes.rated > len(script.MEMBERS) * sizes.ratings + 2


# -- report -------------------------------------------------------------------------------------


def write_row(folder, part, arm, seed=0, lmbda=None, **scores):
    run = script.Run(part, arm, seed, lmbda)
    row = {"part": part, "arm": arm, "seed": seed, "lmbda": lmbda, "roots": 2.0, "seconds": 1.0}
    row |= scores
    (folder / run.name).mkdir(parents=True)
    (folder / run.name / "row.json").write_text(json.dumps(row))


def judged(members, truth, green):
    scores = dict(zip(("biased", "second", "third", "fourth"), members, strict=True))
    return scores | {"truth": truth, "greenish": green}


def cells(text, start):
    """Of the first line of a table that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report_of_known_rows(tmp_path, capsys):
    before = [3.0, 3.0]
    for arm, end in (("mean", [5.0, 5.0]), ("lcb", [4.0, 4.0])):
        members = [[before, [4.0, 4.0], end]] * 4
        truth = [before, [3.5, 3.5], [4.0, 4.0]]
        green = [[0, 0], [0, 1], [1, 1]]
        write_row(
            tmp_path, "prdp", arm, scores=judged(members, truth, green),
            kl=[[0, 0], [1, 1], [2, 3]],
        )  # fmt: skip
    # prompts x particles: the guide likes the second of the first prompt, the first of the other
    pool = [3.0, 4.0, 3.0, 2.0]
    write_row(
        tmp_path, "steer", "plain", lmbda=0.0, best=[1, 0],
        scores=judged([pool] * 4, [2.0, 2.0, 2.0, 4.0], [0, 1, 0, 0]), weights=[[0.5, 0.5]] * 2,
    )  # fmt: skip
    write_row(
        tmp_path, "steer", "mean", lmbda=8.0, best=[1, 0],
        scores=judged([[0.0, 6.0, 6.0, 0.0]] * 4, [0.0, 4.0, 2.0, 0.0], [0, 1, 1, 0]),
        weights=[[0.0, 1.0], [0.5, 0.5]],
    )  # fmt: skip
    (tmp_path / "sizes.json").write_text(json.dumps({"prompts": 2}))
    script.main(["--report", "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    prdp, rest = text.split("### Steering")
    steering, verdicts = rest.split("### Against")
    assert cells(prdp, "mean")[1:] == [
        "1", "3.00", "+2.00", "+0.50", "+1.00 [+1.00, +1.00]", "+1.00 [+1.00, +1.00]",
        "+1.00 [+1.00, +1.00]", "0 %", "100 %", "2.5",
    ]  # fmt: skip
    # plain 3 and truth 2.5; best of two: members 4 and 3, truth 2 and 2
    best_of_k = cells(steering, "mean")
    assert best_of_k[1:4] == ["best of K", "1", "+0.50"] and best_of_k[4].startswith("-0.50")
    assert best_of_k[7] == "50 %"
    steered = next(line for line in steering.splitlines() if "| 8 |" in " ".join(line.split()))
    steered = [cell.strip() for cell in steered.strip("|").split("|")]
    # best: 6 and 6, truth 4 and 2; all, by weights: members 6 and 3, truth 4 and 1
    assert steered[3] == "+3.00" and steered[4].startswith("+0.50") and steered[7] == "100 %"
    assert steered[8] == "2.0" and steered[9:] == ["+0.00", "+1.50", "75 %"]
    assert "Plain samples: truth 2.50, greenish 25 %." in steering
    found = cells(verdicts, "PRDP")
    assert found[1] == "lcb" and found[4:7] == ["1.00", "+0.00", "+1.00"]
    assert found[-1] == "gap smaller; true gain at the end not told apart"
    assert (tmp_path / "uncertainty.png").stat().st_size > 10_000


def test_steering_needs_all_lambdas_of_a_seed():
    def row(arm, seed, lmbda):
        return {
            "arm": arm, "seed": seed, "lmbda": lmbda, "best": [0], "weights": [[0.5, 0.5]],
            "scores": judged([[1.0, 2.0]] * 4, [1.0, 2.0], [0, 0]),
        }  # fmt: skip

    rows = [row("plain", seed, 0.0) for seed in (0, 1)]
    rows += [row("mean", 0, 2.0), row("mean", 0, 8.0), row("mean", 1, 2.0)]
    found = script.steer_curves(rows)
    assert found.keys() == {"mean"} and found["mean"].seeds == (0,)
    np.testing.assert_allclose(found["mean"].values["mean"], [[[1.5, 2.0, 1.0, 1.0]]])


def test_report_without_runs_says_so(tmp_path, capsys):
    script.main(["--report", "--output", str(tmp_path)])
    assert "nothing to report" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# -- the whole ----------------------------------------------------------------------------------


ARGV = ["--tiny", "--only", "mean", "lcb", "terminal_1"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncertainty")
    script.main([*ARGV, "--output", str(folder)])
    return folder


def test_experiment_runs(done):
    sizes = script.TINY
    rows = {p.parent.name: json.loads(p.read_text()) for p in done.glob("*/*/row.json")}
    assert len(rows) == 2 + 1 + 2
    n = sizes.prompts * sizes.eval_samples
    mean, lcb = rows["mean-seed0"], rows["lcb-seed0"]
    for row in (mean, lcb):
        assert np.array(row["scores"]["truth"]).shape == np.array(row["kl"]).shape == (3, n)
        assert max(row["kl"][0]) == 0 < min(row["kl"][2])
    # the same noise before training, and the same options
    assert mean["scores"]["second"][0] == pytest.approx(lcb["scores"]["second"][0])
    assert mean["scores"]["second"][2] != lcb["scores"]["second"][2]
    assert mean["training"] == lcb["training"] and mean["algorithm"] == lcb["algorithm"]
    # what is steered by is what the arm says: its particle is the best by mean - s
    steered = rows["terminal_1-lambda8-seed0"]
    scores = {name: np.array(v) for name, v in steered["scores"].items()}
    believed = script.ARMS["steer"]["terminal_1"].believed(scores).reshape(sizes.prompts, -1)
    assert believed.argmax(1).tolist() == steered["best"]
    np.testing.assert_allclose(np.array(steered["weights"]).sum(1), 1.0)
    assert {"report.md", "uncertainty.png", "uncertainty_samples.png"} <= {
        p.name for p in done.iterdir()
    }
    assert "PRDP" in cells((done / "report.md").read_text().split("### Against")[1], "PRDP")[0]


def test_scores_are_those_of_the_saved_pictures(done):
    """But for their rounding to 8 bits."""
    row = json.loads((done / "prdp" / "lcb-seed0" / "row.json").read_text())
    data = script.load_data(done / "prdp" / "lcb-seed0" / "samples.safetensors").float() / 255
    lab = script.Lab(script.TINY, done)
    found = lab.scores(Samples(data, "image"), seed=0)
    for name in ("truth", "second"):
        torch.testing.assert_close(
            found[name], torch.tensor(row["scores"][name][-1]), atol=0.05, rtol=0.02
        )


def test_what_is_done_is_not_done_again(done, monkeypatch):
    monkeypatch.setattr(script, "finetune", None)
    monkeypatch.setattr(script, "steer", None)
    script.main([*ARGV, "--output", str(done)])
    with pytest.raises(SystemExit, match="choose another --output"):
        script.main(["--only", "mean", "--output", str(done)])
