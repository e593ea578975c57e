"""The experiment of DRAGON runs, and its win rates and its head are what they are said to be."""

import argparse
import json

import numpy as np
import pytest
import reproduce_dragon as dragon
import torch

from diffreward import Samples, evaluate, make_reward
from diffreward.rewards import SetReward


class Total(SetReward):
    """The sum of a set's numbers, plus a bonus for its spread."""

    info = make_reward("vendi").info

    def features(self, samples):
        return samples.data.flatten(1)

    def value(self, features):
        return features.double().sum() + 10 * features.double().std()


# -- win rates ----------------------------------------------------------------------------------


def test_win_rate_by_hand():
    after, before = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 5.0, 3.0])
    assert dragon.win_rate(after, before) == (1 + 0.5 + 0 + 1) / 4
    assert dragon.win_rate(before, after) == 1 - dragon.win_rate(after, before)
    assert dragon.win_rate(before, before) == 0.5


def test_subsets_have_as_many_of_each_prompt():
    rows = dragon.subsets(prompts=3, samples=4, each=2, draws=300)
    assert rows.shape == (300, 6)
    assert all(len(set(r.tolist())) == 6 for r in rows)  # without replacement
    assert (rows // 4 == torch.tensor([0, 0, 1, 1, 2, 2])).all()
    share = torch.bincount(rows.flatten(), minlength=12) / 300
    assert (share - 0.5).abs().max() < 0.15  # 5 standard deviations
    assert torch.equal(rows, dragon.subsets(3, 4, 2, 300))
    assert torch.equal(dragon.subsets(2, 3, 3, 1).sort().values, torch.arange(6)[None])


def test_sets_are_judged_subset_by_subset():
    data = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    rows = torch.tensor([[0, 1], [2, 3], [0, 3]])
    found = dragon.judge(Total(), Samples(data[:, :, None, None].repeat(1, 3, 1, 1), "image"), rows)

    def value(*numbers):
        return 3 * sum(numbers) + 10 * np.std(np.repeat(numbers, 3), ddof=1)

    expected = [value(1, 2), value(4, 8), value(1, 8)]
    torch.testing.assert_close(found.each, torch.tensor(expected, dtype=torch.float64))
    assert found.value == pytest.approx(value(1, 2, 4, 8))


def test_samples_are_judged_one_by_one():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reward = make_reward("saturation")
    found = dragon.judge(reward, Samples(images, "image"), torch.zeros(1, 2).long(), batch=2)
    each = evaluate(reward, Samples(images, "image")).value
    torch.testing.assert_close(found.each, each)
    assert found.value == pytest.approx(each.mean().item())


# -- ratings and their head ---------------------------------------------------------------------


def test_rule_by_hand():
    """Grey, flat images have neither colour nor edges."""
    rng = torch.Generator().manual_seed(1)
    images = (
        torch.rand(40, 3, 8, 8, generator=rng) * torch.linspace(0.1, 1, 40)[:, None, None, None]
    )
    rule = dragon.Rule(images)
    value = rule(Samples(images, "image")).value
    assert value.mean().item() == pytest.approx(3, abs=1e-5)  # standardised over these
    assert dragon.correlation(value, torch.linspace(0.1, 1, 40)) > 0.9  # both quantities rise
    colour = evaluate(make_reward("colorfulness"), Samples(images, "image")).value.double()
    sharp = (1 + evaluate(make_reward("sharpness"), Samples(images, "image")).value.double()).log()
    z = [(x - x.mean()) / x.std() for x in (colour, sharp)]
    torch.testing.assert_close(value.double(), 3 + (z[0] + z[1]) / 2**0.5, rtol=1e-5, atol=1e-5)
    ratings = rule.ratings(images)
    assert set(ratings.tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    grey = torch.full((2, 3, 8, 8), 0.5)
    assert (rule.ratings(grey) == 1).all()


def test_head_recovers_a_smooth_rule():
    """From noisy, rounded ratings of synthetic features, on features it has not seen."""
    rng = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(400, 6, generator=rng), dim=1)
    truth = 3 + 2 * x[:, 0] - x[:, 1] * x[:, 2]
    ratings = (truth + 0.2 * torch.randn(400, generator=rng)).round().clamp(1, 5)
    head = dragon.Head(x[:300], ratings[:300])
    found = head(x[300:])
    assert dragon.correlation(found, truth[300:]) > 0.95
    torch.testing.assert_close(head(x[300:301]), found[:1])  # whatever the batch
    shuffled = dragon.Head(x[:300], ratings[:300][torch.randperm(300, generator=rng)])
    assert shuffled.ridge > head.ridge  # nothing to learn: the smoothest wins, the mean almost
    assert shuffled(x[300:]).std() < 0.1 * found.std()


def test_ridge_is_chosen_by_leaving_one_out():
    """The closed form is what refitting without each rating gives."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(12, 2, generator=rng, dtype=torch.float64)
    y = x[:, 0] + 0.3 * torch.randn(12, generator=rng, dtype=torch.float64)
    head = dragon.Head(x, y)
    kernel = (-(torch.cdist(x, x) ** 2) / (2 * head.width**2)).exp()
    errors = []
    for ridge in dragon.Head.RIDGES:
        each = []
        for i in range(12):
            rest = [j for j in range(12) if j != i]
            inverse = torch.linalg.inv(kernel[rest][:, rest] + ridge * torch.eye(11).double())
            guess = y.mean() + kernel[i, rest] @ inverse @ (y - y.mean())[rest]
            each.append((guess - y[i]) ** 2)
        errors.append(torch.stack(each).mean().item())
    assert head.ridge == dragon.Head.RIDGES[int(np.argmin(errors))]
    weights = torch.linalg.solve(kernel + head.ridge * torch.eye(12).double(), y - y.mean())
    torch.testing.assert_close(head(x), y.mean() + kernel @ weights)


# -- plan ---------------------------------------------------------------------------------------


def test_twenty_rewards_of_all_families():
    targets = dragon.TARGETS
    assert len(targets) == 20
    assert {t.kind for t in targets.values()} == set(dragon.KINDS)
    of_image = [t for t in targets.values() if t.domain == "image"]
    assert len(of_image) == 16
    for a, b in dragon.DISTINCT:  # the same encoder and exemplars, but for the windows of k-mers
        assert targets[a].kind == "set" and targets[b].kind == "per_sample"
        assert targets[a].spec["exemplars"] == targets[b].spec["exemplars"]
        encoders = [targets[n].spec["encoder"] for n in (a, b)]
        assert encoders[0] == encoders[1] or encoders[1]["name"] == encoders[0]
    assert {targets[name].kind for name in dragon.ABLATED} == set(dragon.KINDS)
    assert not set(dragon.JUDGES) & set(targets)


def test_kinds_are_those_of_the_rewards():
    from diffreward.rewards import available_rewards

    known = available_rewards()
    for target in dragon.EVALUATED.values():
        if target.spec is not None:
            name = target.spec if isinstance(target.spec, str) else target.spec["name"]
            assert known[name].of_sets == (target.kind == "set"), name


def test_plan():
    args = argparse.Namespace(only=list(dragon.TARGETS), arms=list(dragon.ARMS), seeds=[0, 1])
    runs = dragon.plan(args)
    assert len(runs) == len(set(runs)) == 2 * (2 + 20 + 2 * 3)
    assert len({run.name for run in runs}) == len(runs)
    last = [run for run in runs if run.seed == 0 and run.target == "aesthetics"]
    assert [run.arm for run in last] == ["dpo", "kto", "kto_unpaired"]
    args.only, args.arms = ["dna_oracle"], ["kto"]  # nothing is ablated there
    assert [run.name for run in dragon.plan(args)] == [
        "dna/pretrained-chance-seed0", "dna/pretrained-chance-seed1"
    ]  # fmt: skip


# -- report -------------------------------------------------------------------------------------


def fake(folder, target, arm="dpo", seed=0, domain="image", after=-3.0, **wins):
    """A finished run whose evaluations are 0.25, or what ``wins`` says."""
    run = dragon.Run(domain, target, arm, seed)
    names = [n for n, t in dragon.EVALUATED.items() if t.domain == domain]
    evaluation = {
        n: {"win": wins.get(n, 0.25), "before": -4.0, "after": after - seed} for n in names
    }  # fmt: skip
    row = {"domain": domain, "target": target, "arm": arm, "seed": seed, "kl": 2.0}
    (folder / run.name).mkdir(parents=True)
    (folder / run.name / "row.json").write_text(json.dumps(row | {"evaluation": evaluation}))


def cells(text, start):
    """Of the first line of a table that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report_of_known_rows(tmp_path, capsys):
    fake(tmp_path, None, "chance", clip_score=0.5)
    fake(tmp_path, "clip_score", clip_score=0.9)
    fake(tmp_path, "clip_score", seed=1, clip_score=0.7)
    fake(tmp_path, "frechet_clip_warm", frechet_clip_warm=1.0, per_sample_clip_warm=0.4)
    fake(tmp_path, "per_sample_clip_warm", after=-2.0, per_sample_clip_warm=0.6)
    fake(tmp_path, "frechet_clip_warm", "kto", frechet_clip_warm=0.35)
    fake(tmp_path, "dna_oracle", domain="dna", dna_oracle=0.2)
    dragon.main(["--report", "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    wins, rest = text.split("### Win rates, every reward on every other: image", 1)
    assert cells(wins, "CLIP score")[1:] == [
        "of a sample", "2", "-4", "-3.5", "80.0 %", "50.0 %", "2"
    ]  # fmt: skip
    assert cells(wins, "regulatory oracle")[6] == "-"  # no run by chance
    # clip_score 0.8, frechet 1.0, per sample 0.6, oracle 0.2
    assert cells(wins, "all")[1:3] == ["4", "65.0 %"]
    assert cells(wins, "all")[4] == "3 of 4"
    assert cells(wins, "of a sample")[1:3] == ["2", "50.0 %"]
    crossed = rest.split("###")[0]
    assert cells(crossed, "trained on")[1:] == [
        "1", "2", "3", "the rule of the ratings", "held-out CLIP score"
    ]  # fmt: skip
    assert cells(crossed, "2 Frechet")[1:] == ["25", "100", "40", "25", "25"]
    ablated = cells(text.split("### DPO")[1], "Frechet, CLIP, warm")
    assert ablated[1:] == ["100.0 % (+1)", "35.0 % (+1)", "-"]
    distinct = text.split("### Dataset")[1]
    assert cells(distinct, "CLIP, warm") == ["CLIP, warm", "pretrained", "4", "4"]
    lines = [line.strip("| ").split("|") for line in distinct.splitlines() if "trained on" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["trained on dataset", "3 (100.0 %)", "3 (40.0 %)"],
        ["trained on per-sample", "2 (25.0 %)", "2 (60.0 %)"],
    ]
    assert {"dragon_wins.png", "dragon_cross.png"} <= {p.name for p in tmp_path.iterdir()}


def test_report_without_runs_says_so(tmp_path, capsys):
    dragon.main(["--report", "--output", str(tmp_path)])
    assert "nothing to report" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_interval_over_rewards():
    assert dragon.averaged([0.5, 0.5]) == (0.5, 0.5, 0.5)
    mean, low, high = dragon.averaged([0.0, 1.0] * 50)
    assert mean == 0.5 and (high - low) == pytest.approx(4 * 0.05, rel=0.1)


# -- the whole ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dragon")
    dragon.main(["--tiny", "--only", "dna_oracle", "--output", str(folder)])
    return folder


def test_experiment_runs(done):
    sizes, rows = dragon.TINY["dna"], {}
    n = sizes.prompts * sizes.eval_samples
    before = dragon.load_data(done / "dna" / "before-seed0.safetensors")
    for name in ("pretrained-chance-seed0", "dna_oracle-dpo-seed0"):
        rows[name] = json.loads((done / "dna" / name / "row.json").read_text())
        data = dragon.load_data(done / "dna" / name / "samples.safetensors")
        assert data.shape == before.shape == (n, 200) and data.max() < 4
        assert not torch.equal(data, before)
        assert set(rows[name]["evaluation"]) == {
            "dna_oracle", "dna_vendi", "dna_frechet", "dna_per_sample", "dna_judge"
        }  # fmt: skip
        # the numbers are those of the saved samples
        after = Samples(data.long(), "dna", [f"region {k + 1}" for k in range(2) for _ in range(4)])
        each = evaluate(make_reward("sequence_oracle"), after).value
        own = rows[name]["evaluation"]["dna_oracle"]
        assert own["after"] == pytest.approx(each.mean().item(), rel=1e-5)
        old = evaluate(make_reward("sequence_oracle"), Samples(before.long(), "dna")).value
        assert own["win"] == pytest.approx((each > old).double().mean().item())
    row = rows["dna_oracle-dpo-seed0"]
    assert row["kl"] > 0 and len(row["curve"]) == sizes.iterations
    assert (done / "report.md").exists() and (done / "dragon_cross.png").exists()


def test_what_is_done_is_not_done_again(done, monkeypatch):
    rows = {path: path.stat().st_mtime_ns for path in (done / "dna").glob("*/row.json")}
    assert len(rows) == 2
    argv = ["--tiny", "--only", "dna_oracle", "--output", str(done)]
    monkeypatch.setattr(dragon, "finetune", None)  # training is over
    dragon.main(argv)
    assert rows == {path: path.stat().st_mtime_ns for path in rows}
    trained = done / "dna" / "dna_oracle-dpo-seed0" / "row.json"
    known = json.loads(trained.read_text())
    trained.unlink()  # judged anew, from the saved samples
    dragon.main(argv)
    assert json.loads(trained.read_text())["evaluation"] == known["evaluation"]
    with pytest.raises(SystemExit, match="choose another --output"):
        dragon.main(["--only", "dna_oracle", "--output", str(done)])


def test_an_untrained_model_wins_half(tmp_path, monkeypatch):
    """Both models' samples are from the same noise, and only training makes them differ."""
    monkeypatch.setattr(dragon.Lab, "trained", lambda lab, run: (lab.domain.policy(), {}))
    lab = dragon.Lab("dna", dragon.TINY["dna"], tmp_path)
    lab.names = ["dna_oracle", "dna_vendi"]
    for seed in (0, 1):
        row = lab.perform(dragon.Run("dna", "dna_oracle", "dpo", seed))
        assert [found["win"] for found in row["evaluation"].values()] == [0.5, 0.5]
    ends = [lab.before("dna_oracle", seed).value for seed in (0, 1)]
    assert ends[0] != ends[1]
    data = dragon.load_data(tmp_path / "dna" / "before-seed0.safetensors")
    assert len(data.unique(dim=0)) == len(data)  # no noise twice


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dragon.Lab, "trained", lambda lab, run: (None, {}))
    (tmp_path / "dna" / "pretrained-chance-seed0").mkdir(parents=True)
    fake_chance = tmp_path / "dna" / "pretrained-chance-seed0" / "row.json"
    fake_chance.write_text(json.dumps({"domain": "dna", "target": None, "arm": "chance"}))
    dragon.main(["--tiny", "--only", "dna_oracle", "--output", str(tmp_path)])
    assert "interrupted" in capsys.readouterr().out
    assert not (tmp_path / "dna" / "dna_oracle-dpo-seed0").exists()
