import pytest
import torch
from painter import Painter
from PIL import Image

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
