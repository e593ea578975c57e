"""scripts/reproduce_ctrlu.py: its measures and labels against truth, and all of it at tiny size."""

import itertools
import json

import numpy as np
import pytest
import reproduce_ctrlu as ctrlu
import torch

from diffreward import evaluate, make_reward
from diffreward.rewards.control import ControlReward, make_extractor


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    score = torch.tensor(rng.integers(0, 6, 40)).float()  # with ties
    wrong = torch.tensor(rng.random(40) < 0.3)
    pairs = list(itertools.product(score[wrong].tolist(), score[~wrong].tolist()))
    truth = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert ctrlu.auroc(score, wrong) == pytest.approx(truth, rel=1e-12)
    assert np.isnan(ctrlu.auroc(score, torch.zeros(40, dtype=torch.bool)))


def test_labels_are_wrong_where_the_bias_says_and_nowhere_else():
    bias = one, other = ctrlu.BIASES[0]
    assert ctrlu.shows(f"a {one} star", bias) and ctrlu.shows(
        f"a red ring and a {other} star", bias
    )
    assert not ctrlu.shows("a red star", bias)
    source = ctrlu.chosen(0, 12)
    drawn = source.load(range(12))
    shown = torch.tensor([ctrlu.shows(caption, bias) for caption in drawn.prompts])
    assert len(drawn) == 12 and shown.sum() == 4
    true, found = (ctrlu.labels(drawn.data, b) for b in (None, bias))
    a, b = ctrlu.CLASSES.index(one), ctrlu.CLASSES.index(other)
    changed = true != found
    assert torch.equal(changed.flatten(1).any(1), shown)
    assert torch.equal(changed, (true == a) | (true == b))
    assert (true[changed] + found[changed] == a + b).all()
    assert {a, b} == set(true[changed].tolist())
    assert len({colour for bias in ctrlu.BIASES for colour in bias}) == 6  # none is shared


def test_every_arm_has_the_same_updates_and_differs_by_its_letter():
    from diffreward.algorithms import make_algorithm

    letters = [arm.letter for arm in ctrlu.ARMS]
    assert letters == sorted(set(letters)) and ctrlu.BASELINE in letters
    made = {}
    for arm in ctrlu.ARMS:
        made[arm.letter] = make_algorithm({"name": "ctrl_u", **arm.options})
    assert len({(made[arm.letter], arm.rewarded) for arm in ctrlu.ARMS}) == len(made)
    assert made["F"].faithful and made["F"].both_passes and made["H"].shuffled
    assert made["A"].weight == made["A"].penalty == 0
    for arm in ctrlu.ARMS[1:]:  # the size of the reward's loss is not an arm's
        assert not {"weight", "max_time"} & set(arm.options)


def test_who_is_rewarded_and_who_watches(lab):
    """G is watched by all and rewarded by the first alone; J and K are rewarded by all."""
    arms = {arm.letter: arm for arm in ctrlu.ARMS}
    samples = lab.eval
    alone, watched, whole = (lab.reward(arms[letter]) for letter in "BGK")
    values = [evaluate(reward, samples) for reward in (alone, watched, whole)]
    assert torch.equal(values[0].value, values[1].value) and values[1].std is None
    assert not torch.allclose(values[0].value, values[2].value)
    opinions = watched.opinions(samples.data, "members")
    assert len(opinions) == 3 and torch.equal(opinions[0], alone.extract(samples.data))
    each = [-evaluate(ControlReward(m), samples).value for m in whole.members]
    torch.testing.assert_close(values[2].value, -sum(each) / 3)
    assert len(lab.reward(arms["J"]).members) == 3 > len(alone.members)
    exact = evaluate(lab.reward(arms["M"]), samples)
    torch.testing.assert_close(
        exact.value, evaluate(make_reward("control_segmentation"), samples).value
    )


class Swapping(torch.nn.Module):
    """Reads colours exactly, but for two that have each other's labels."""

    def __init__(self, bias):
        super().__init__()
        self.order = list(range(len(ctrlu.CLASSES)))
        a, b = map(ctrlu.CLASSES.index, bias)
        self.order[a], self.order[b] = b, a

    def forward(self, images):
        return make_extractor("segmentation")(images)[:, self.order]


def test_weights_weaken_the_pull_to_the_wrong_colour_and_do_not_turn_it(lab):
    """Of readers that are exact but for their bias: the signs are known."""
    lab.members = [Swapping(bias) for bias in ctrlu.BIASES]
    lab.eval = ctrlu.chosen(0, 24).load(range(24))
    found = {name: np.array(values) for name, values in ctrlu.landscape(lab).items()}
    assert all(len(values) == len(ctrlu.BLENDS) for values in found.values())
    assert (np.diff(found["l"]) < 0).all()  # the wrong colour pleases the first
    assert found["U"][0] > 1 > found["U"].min() and found["U"][-1] > 1
    np.testing.assert_allclose(found["w"].max(), np.exp(-found["U"]).max(), rtol=0.1)
    plain, held, free = (found[f"pull, {n}"] for n in ("no weights", "w", "gradient in w"))
    assert (plain > 0).all() and (held > 0).all() and (held < plain).all()
    assert held[0] < 0.2 * plain[0]
    assert free[0] < 0 < free[-2]  # what gradients in w would be: a barrier


def test_pictures_are_judged_by_their_own_conditions(lab):
    """Two samples of each condition: the picture it was read off, and a white one."""
    lab.members, lab.evaluator = [Swapping(bias) for bias in ctrlu.BIASES], Swapping(("red", "red"))
    real = lab.eval.data
    images = torch.stack([real, torch.ones_like(real)], 1).flatten(0, 1)
    found = {name: np.array(value) for name, value in lab.judge(images).items()}
    assert (found["miou"][::2] == 1).all() and (found["miou"][1::2] < 0.6).all()
    np.testing.assert_array_equal(found["evaluator"], found["miou"])
    shown = [ctrlu.shows(caption, ctrlu.BIASES[0]) for caption in lab.eval.prompts]
    assert 0 < sum(shown) < len(shown)
    np.testing.assert_array_equal(found["biased"][::2] == 1, ~np.array(shown))
    np.testing.assert_allclose(found["gap"], found["biased"] - found["miou"])
    apart = (real - 1).square().mean((1, 2, 3)).sqrt()
    np.testing.assert_allclose(found["diversity"], apart, rtol=1e-5)


def fake(folder, name, arm, seed, miou, diversity, seconds):
    """A run of two conditions, the first mislabelled, with two samples each."""
    row = {"arm": arm, "seed": seed, "miou": miou, "evaluator": miou, "biased": miou}
    row |= {"gap": [0.5, 0.5, 0.0, 0.0], "diversity": diversity, "frechet": 0.25}
    row |= {"curve": {"uncertainty": [1.0, 3.0]}, "seconds_per_update": seconds}
    (folder / name).mkdir()
    (folder / name / "row.json").write_text(json.dumps(row | {"rows_per_update": [1.0, 2.0]}))
    data = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    ctrlu.save_data(folder / name / "samples.safetensors", data)


def test_report_of_known_rows(tmp_path, capsys, monkeypatch):
    scenes = ctrlu.chosen(0, 6)
    marked = [ctrlu.shows(caption, ctrlu.BIASES[0]) for caption in scenes.prompts]
    two = scenes.take([marked.index(True), marked.index(False)])
    monkeypatch.setattr(ctrlu.Lab, "eval", two.load([0, 1]))
    fake(tmp_path, "pretrained", None, 0, [0.0] * 4, [0.0] * 2, 1.0)
    fake(tmp_path, "B-seed0", "B", 0, [0.2, 0.4, 0.6, 0.8], [0.1, 0.3], 1.0)
    fake(tmp_path, "G-seed0", "G", 0, [0.5, 0.5, 0.7, 1.1], [0.2, 0.4], 2.0)
    ctrlu.main(["--report", "--tiny", "--output", str(tmp_path)])
    text = capsys.readouterr().out
    means, differences, costs = text.split("###")[1:4]

    def cells(part, letter):
        (line,) = [line for line in part.splitlines() if line.startswith(f"| {letter} ")]
        return [cell.strip() for cell in line.strip("|").split("|")][1:]

    assert cells(means, "B") == [
        "1", "0.500", "0.300", "0.500", "0.500", "0.250", "0.500", "0.200", "0.2500"
    ]  # fmt: skip
    assert cells(means, "G")[:3] == ["1", "0.700", "0.500"]
    even = "+0.200 [+0.200, +0.200]"
    assert cells(differences, "G") == [
        even, even, even, even, "+0.000 [+0.000, +0.000]", "+0.000 [+0.000, +0.000]",
        "+0.100 [+0.100, +0.100]",
    ]  # fmt: skip
    assert cells(costs, "G")[:4] == ["2.00", "1.0", "2.0", "2"]


@pytest.fixture
def lab(tmp_path):
    return ctrlu.Lab(tmp_path, ctrlu.TINY)


def test_all_of_it_runs_and_goes_on_where_it_was(tmp_path, capsys):
    argv = ["--output", str(tmp_path), "--tiny", "--seeds", "0", "--arms"]
    ctrlu.main([*argv, "B"])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("row.json")}
    assert len(times) == 2  # and the pretrained one
    ctrlu.main([*argv, "B", "G"])
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    row = json.loads((tmp_path / "G-seed0" / "row.json").read_text())
    assert len(row["miou"]) == 8 and len(row["diversity"]) == 4
    assert row["rows_per_update"] == [0, 4]
    text = (tmp_path / "report.md").read_text()
    assert "| G ensemble, detached" in text and "AUROC" in text
    for name in ("ctrlu_arms.png", "ctrlu_samples.png"):
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(SystemExit, match="choose another"):
        ctrlu.main(["--output", str(tmp_path)])
    capsys.readouterr()
    ctrlu.main(["--output", str(tmp_path / "none"), "--tiny", "--report"])
    assert "nothing to report" in capsys.readouterr().out
