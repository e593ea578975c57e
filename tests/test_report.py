import dataclasses
import json
import math

import pytest
import torch
from painter import Painter
from PIL import Image
from token_toys import TokenChain

from diffreward import files, report
from diffreward.rewards import make_reward
from diffreward.samples import Samples
from diffreward.steering import steer


@pytest.fixture(scope="module")
def run():
    prompts = ["a red heart", "smiling face"]
    guide = make_reward("target_color", color="red")
    result = steer(
        Painter(), guide, prompts, num_particles=3, lmbda=5.0, best_of_n=True, ess_threshold=0.98
    )
    judges = {
        "colorfulness": (make_reward("colorfulness"), [True, True]),
        "shapes_checker": (make_reward("shapes_checker"), [True, False]),
    }
    return report.SteeringReport(prompts, result, "target_color", judges, 6, 0.98)


@pytest.fixture(scope="module")
def designs():
    """A run over DNA of 5 letters."""
    policy = TokenChain(4, length=5, vocabulary=4)
    policy.modality = "dna"
    guide, judge = make_reward("gc_content"), make_reward("homopolymer")
    prompts = ["one", "two"]
    result = steer(policy, guide, prompts, num_particles=3, lmbda=3.0, best_of_n=True)
    judges = {"homopolymer": (judge, [True, False])}
    return report.SteeringReport(prompts, result, "gc_content", judges, 4, 0.5)


# -- steering -----------------------------------------------------------------------------------


def test_means_are_those_of_the_particles(run):
    plain, steered = run.result.best_of_n.scores.value, run.result.scores.value
    expected = [plain.mean(), plain.view(2, 3).amax(1).mean(), steered.view(2, 3).amax(1).mean()]
    torch.testing.assert_close(run.means("target_color"), [float(e) for e in expected])
    # a held-out reward is that of the particle which the guide prefers, where it can judge
    best = run.result.best_of_n.particles.take([int(run.result.best_of_n.best[0])])
    judged = make_reward("shapes_checker")(best).value.item()
    assert run.means("shapes_checker")[1] == judged
    assert "shapes_checker (held out, 1 of 2 prompts)" in run.summary()
    assert run.columns == ["unsteered", "best-of-3", "steered"]


def test_rows_tell_every_particle(run):
    rows = list(run.rows())
    assert len(rows) == 2 * 2 * 3
    steered = [row for row in rows if row["arm"] == "steered"]
    assert [row["score"] for row in steered] == run.result.scores.value.tolist()
    assert sum(row["chosen"] for row in rows) == 4
    for p, prompt in enumerate(run.prompts):
        these = [row for row in steered if row["prompt"] == prompt]
        assert len({row["root"] for row in these}) == run.result.roots[p]
    assert all(row["log_weight"] is None for row in rows if row["arm"] == "plain")


def test_roots_follow_the_ancestors():
    ancestors = torch.tensor([[[1, 1, 2]], [[2, 0, 0]]])
    roots = report._roots_of(ancestors, 3)[:, 0]
    assert roots.tolist() == [[0, 1, 2], [1, 1, 2], [2, 1, 1]]


def test_write(run, tmp_path):
    run.write(tmp_path, "seed: 0\n", files.environment("cpu", seconds=1.0))
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {
        "README.md", "config.yaml", "env.json", "grid.png", "images", "lineage.png",
        "images/000-a-red-heart.png", "images/001-smiling-face.png", "scores.jsonl",
    }  # fmt: skip
    with Image.open(tmp_path / "images" / "000-a-red-heart.png") as image:
        assert image.size == (16, 16)
    readme = (tmp_path / "README.md").read_text()
    assert "best-of-3" in readme and "6 chains of 6 steps" in readme


def test_sequences_are_written_in_letters(designs, tmp_path):
    """As Biopython reads them: each prompt's steered best, then all plain ones."""
    SeqIO = pytest.importorskip("Bio.SeqIO")
    first = designs.write(tmp_path, "seed: 0\n", files.environment("cpu", seconds=1.0))
    assert first == tmp_path / "logo.png"
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "config.yaml", "env.json", "lineage.png", "logo.png", "rewards.png",
        "samples.fasta", "scores.jsonl",
    }  # fmt: skip
    records = list(SeqIO.parse(tmp_path / "samples.fasta", "fasta"))
    best = designs.result.best.tolist()
    names = [f"steered-{p}-{best[p]}" for p in range(2)]
    assert [r.id for r in records] == names + [f"plain-{p}-{j}" for p in range(2) for j in range(3)]
    for record in records:
        scores = dict(word.split("=") for word in record.description.split()[1:])
        share = sum(letter in "GC" for letter in record.seq) / 5
        assert float(scores["gc_content"]) == pytest.approx(share)
        assert ("homopolymer" in scores) == record.id.split("-")[1].startswith("0")
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    known = {f"{r['arm']}-{r['prompt_index']}-{r['particle']}": r["sequence"] for r in rows}
    assert len(known) == 12 and all(known[r.id] == str(r.seq) for r in records)
    readme = (tmp_path / "README.md").read_text()
    for name in ("samples.fasta", "logo.png", "rewards.png", "lineage.png"):
        assert f"`{name}`" in readme
    assert "grid.png" not in readme and "picture" not in readme


def test_logo_counts_particles_by_their_weights(designs, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        report, "logo_figure", lambda sets, m: shown.update({s.title: s for s in sets})
    )
    designs.logo()
    x = torch.nn.functional.one_hot(designs.result.particles.data, 4).double()
    w = designs.result.log_weights.double().exp()
    w = (w / w.sum(1, keepdim=True)).flatten() / 2  # prompts count the same
    expected = (w[:, None, None] * x).sum(0)
    torch.testing.assert_close(shown["steered, by their weights"].share, expected)
    plain = torch.nn.functional.one_hot(designs.result.best_of_n.particles.data, 4).double()
    torch.testing.assert_close(shown["unsteered"].share, plain.mean(0))
    assert list(shown) == ["unsteered", "steered, by their weights"]


def test_distributions_show_every_value(designs):
    axes = designs.distributions().axes
    assert [a.get_title("left") for a in axes] == ["gc_content (guide)", "homopolymer (held out)"]
    for axis, label in zip(axes, designs.steered.scores, strict=True):
        assert [t.get_text() for t in axis.get_yticklabels()] == designs.columns
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        bars = [line.get_xdata()[0] for line in axis.lines if line.get_marker() != "o"]
        for line, value in zip(dots, designs.values(label), strict=True):
            known = [v for v in value.tolist() if not math.isnan(v)]
            assert sorted(line.get_xdata()) == pytest.approx(sorted(known))
        assert bars == pytest.approx(designs.means(label))
    assert [len(v) for v in designs.values("gc_content")] == [6, 2, 2]


@pytest.mark.parametrize("modality", ["text", "toy"])
def test_texts_and_anything_else(modality, tmp_path):
    policy = TokenChain(2)
    result = steer(policy, lambda samples: torch.zeros(len(samples)), ["x"], num_particles=2)
    if modality == "text":
        texts = [["two\nlines"], ["two\nlines", "other"]]
        chosen, all_of = (Samples(data, "text") for data in texts)
        result = dataclasses.replace(result, samples=chosen, particles=all_of)
    found = report.SteeringReport(["x"], result, "nothing", {}, 2)
    first = found.write(tmp_path, "", files.environment("cpu"))
    names = {path.name for path in tmp_path.iterdir()}
    always = {"README.md", "config.yaml", "env.json", "lineage.png", "scores.jsonl"}
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    if modality == "text":
        assert names == {*always, "samples.txt"} and first.name == "samples.txt"
        assert first.read_text() == "two lines\n" and rows[0]["text"] == "two\nlines"
    else:
        assert names == always and first.name == "scores.jsonl"
        assert rows[1]["tokens"] == result.particles.data[1].tolist()


def test_write_without_comparison_or_selection(tmp_path):
    result = steer(Painter(1), "colorfulness", ["x"] * 10, num_particles=1, schedule=[])
    found = report.SteeringReport(["x"] * 10, result, "colorfulness", {}, 1)
    found.write(tmp_path, "", files.environment("cpu"))
    assert found.columns == ["steered"]
    assert (tmp_path / "lineage.png").stat().st_size > 0


def test_judging_is_in_batches_and_needs_no_gradient():
    seen = []

    def judge(samples: Samples):
        seen.append(len(samples))
        assert not torch.is_grad_enabled()
        return samples.data.mean((1, 2, 3))

    result = steer(Painter(1), "colorfulness", ["x"] * 50, num_particles=2, schedule=[])
    judges = {"mean": (make_reward(judge), [True] * 50)}
    report.SteeringReport(["x"] * 50, result, "colorfulness", judges, 1)
    assert seen == [64, 36]


def test_slug():
    assert report.slug("A red Heart, above/below ../x") == "a-red-heart-above-below-x"
    assert report.slug("☕") == "no-prompt"
