import json
import math

import pytest
import torch
from painter import Painter
from PIL import Image

from diffreward import report
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


# -- folders and files --------------------------------------------------------------------------


def test_run_folders_are_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report.time, "strftime", lambda form: form.split("%")[0] + "now")
    found = []
    for _ in range(3):
        with report.run_folder(None, "steer") as folder:
            found.append(folder)
            (folder / "file").touch()
    assert [f.as_posix() for f in found] == [
        "runs/steer-now", "runs/steer-now-2", "runs/steer-now-3"
    ]  # fmt: skip
    with (
        pytest.raises(FileExistsError, match="choose another --output"),
        report.run_folder(found[0], "steer"),
    ):
        pass


def test_failed_run_leaves_what_was_written_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), report.run_folder(None, "steer"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), report.run_folder("kept", "steer") as folder:
        report.write_text(folder / "a.txt", "a")
        _ = 1 / 0
    assert (tmp_path / "kept" / "a.txt").read_text() == "a"


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    report.write_text(path, "old")

    def half(beside):
        beside.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.write_atomic(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_jsonl_is_strict_json(tmp_path):
    rows = [{"a": math.nan, "b": -math.inf, "c": torch.tensor(1.5), "d": "é"}, {"e": (1, [None])}]
    report.write_jsonl(tmp_path / "x.jsonl", rows)
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()

    def refuse(constant):
        raise AssertionError(constant)

    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert found == [{"a": None, "b": "-inf", "c": 1.5, "d": "é"}, {"e": [1, [None]]}]


def test_environment_names_versions_but_no_machine():
    found = report.environment("cpu", seed=3)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["device"] == "cpu" and found["seed"] == 3
    assert set(found) == {
        "diffreward", "python", "platform", "device", "device_name", "date", "packages", "seed"
    }  # fmt: skip


def test_table():
    shown = report.table(["name", "a"], [["x", "1.0"], ["longer", "-10.0"]])
    assert shown.splitlines() == ["name         a", "x          1.0", "longer   -10.0"]
    shown = report.table(["name", "ab"], [["x", "1"]], markdown=True)
    assert shown.splitlines() == ["| name | ab |", "| ---- | -: |", "| x    |  1 |"]


# -- pictures -----------------------------------------------------------------------------------


def test_small_pictures_are_enlarged_without_smoothing():
    picture = torch.rand(3, 8, 8)
    sheet = report.image_grid(["one"], [("title", [report.Cell(picture, ("score 1",))])])
    exact = report.to_pil(picture).resize((208, 208), Image.Resampling.NEAREST)
    spot = sheet.crop((14, 0, 14 + 208, sheet.height))
    tops = [y for y in range(sheet.height - 208) if spot.crop((0, y, 208, y + 208)) == exact]
    assert len(tops) == 1


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (1024, 768)])
def test_grid_of_any_size(size):
    cells = [report.Cell(torch.rand(3, *size), ("a", "b" * 60)) for _ in range(3)]
    rows = [("a title that is long " * 30, cells), ("", cells)]
    sheet = report.image_grid(["x", "y", "z"], rows)
    assert sheet.width < 2500 and sheet.height < 2500


def test_pictures_keep_their_values(tmp_path):
    picture = torch.randint(0, 256, (3, 5, 7)) / 255
    report.save_image(tmp_path / "x.png", report.to_pil(picture))
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (7, 5)
        assert image.getpixel((6, 4)) == tuple((picture[:, 4, 6] * 255).round().int().tolist())


def test_slug():
    assert report.slug("A red Heart, above/below ../x") == "a-red-heart-above-below-x"
    assert report.slug("☕") == "no-prompt"


# -- steering -----------------------------------------------------------------------------------


def test_judge_prompts():
    can, problem = report.judge_prompts(make_reward("shapes_checker"), ["a red heart", "a cat"])
    assert can == [True, False] and "a cat" in problem
    can, problem = report.judge_prompts(make_reward("colorfulness"), ["a cat"])
    assert can == [True] and problem == ""


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
    run.write(tmp_path, "seed: 0\n", report.environment("cpu", seconds=1.0))
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
    found.write(tmp_path, "", report.environment("cpu"))
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
