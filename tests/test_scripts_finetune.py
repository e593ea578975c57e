"""The experiments and benchmarks of finetuning run, and what they compute with is right."""

import copy
import json
import math
import sys

import bench_finetune as bench
import numpy as np
import pytest
import reproduce_prdp as prdp
import tiny
import torch

from diffreward import load_policy
from diffreward.policy import Trajectory, path_log_prob
from diffreward.rewards.shapes import parse

# -- reproduce_prdp ---------------------------------------------------------------------------


def test_report_without_runs_says_so(tmp_path, capsys):
    prdp.main(["--report", "--output", str(tmp_path)])
    assert "nothing to report" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(a), one arm: two runs of the grid and one of a seed."""
    folder = tmp_path_factory.mktemp("prdp")
    prdp.main(["--tiny", "--only", "a", "--arms", "prdp_minibatches", "--output", str(folder)])
    return folder


def test_run_is_read_off_at_both_budgets(done):
    row = json.loads((done / "a/prdp_minibatches-seed0/row.json").read_text())
    marks, tiny_ = row["marks"], prdp.TINY
    assert marks["queries"]["queries"] == tiny_.queries[0]
    one = marks["compute"]["compute"] / marks["compute"]["iteration"]
    assert abs(marks["compute"]["compute"] - tiny_.compute[0]) <= one / 2
    for mark in ("before", "queries", "compute"):
        scores = marks[mark]["scores"]
        assert set(scores) == {"clip_score", "clip_judge", "shapes_checker"}
        assert all(len(v) == tiny_.trained + tiny_.unseen[0] for v in scores.values())
    assert marks["before"]["kl"] == 0 < marks["compute"]["kl"]
    # rollout and reference without gradient, then with; 3 of 4 minibatches once more without
    samples, rows = 8, 8 * tiny_.num_steps * 2
    assert row["curve"][0] == {"queries": 0, "compute": 0, "mean": row["curve"][0]["mean"]}
    assert row["curve"][1]["queries"] == samples
    assert row["curve"][1]["compute"] <= (1 + 1 + 3 + 0.75) * rows


def test_learning_rate_is_that_of_the_better_run_of_the_grid(done):
    ends = {}
    for path in done.glob("a/grid/*/row.json"):
        row = json.loads(path.read_text())
        ends[row["learning_rate"]] = np.mean(row["marks"]["compute"]["scores"]["clip_score"])
    assert set(ends) == set(prdp.TINY.grid)
    chosen = json.loads((done / "a/prdp_minibatches-seed0/row.json").read_text())["learning_rate"]
    assert chosen == max(ends, key=ends.get)


def test_what_is_done_is_not_run_again(done, capsys):
    before = {p: p.stat().st_mtime_ns for p in done.glob("**/row.json")}
    prdp.main(["--tiny", "--only", "a", "--arms", "prdp_minibatches", "--output", str(done)])
    assert before == {p: p.stat().st_mtime_ns for p in done.glob("**/row.json")}
    out = capsys.readouterr().out
    assert "3 runs, 3 done" in out and "PRDP, minibatches" in out and "no run" not in out.lower()
    assert (done / "prdp.png").stat().st_size > 10_000
    assert (done / "report.md").read_text() in out


def test_other_sizes_are_refused(done):
    with pytest.raises(SystemExit, match=r"queries \[8, 8, 0\] \(now \[16, 16, 0\]\)"):
        prdp.main(["--tiny", "--scale", "2", "--only", "c", "--output", str(done)])


def test_signal_is_what_gradients_have_in_common():
    """(n, d): the same vector; opposite ones; a mean and noise, many times over."""
    same = prdp.signal(torch.full((4, 9), 2.0))
    assert same == pytest.approx({"norm": 36, "signal": 36, "error": 0})
    opposite = prdp.signal(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
    assert opposite["signal"] == pytest.approx(-1 / 3) and opposite["norm"] == 1
    found, rng = [], torch.Generator().manual_seed(0)
    for _ in range(2000):  # signal 1, norm 1 + 5
        noise = torch.randn(8, 5, generator=rng)
        found.append(prdp.signal(noise + torch.tensor([1.0, 0, 0, 0, 0])))
    signals = np.array([f["signal"] for f in found])
    assert abs(signals.mean() - 1) < 4 * signals.std() / 2000**0.5
    assert np.mean([f["norm"] for f in found]) == pytest.approx(6, rel=0.02)
    # the jackknife is conservative for products, with few batches above all
    assert 0.95 < np.mean([f["error"] ** 2 for f in found]) / signals.var() < 1.6


def test_steps_are_measured_once(tmp_path, capsys):
    command = ["--tiny", "--only", "d", "--output", str(tmp_path)]
    prdp.main(command)
    rows = json.loads((tmp_path / "steps.json").read_text())
    assert [(r["of"], r["steps"]) for r in rows] == [("step", 1), ("step", 2), ("first", 2)]
    assert all(0 < r["norm"] for r in rows)
    assert "| first 2 |" in capsys.readouterr().out
    (tmp_path / "steps.json").write_text(json.dumps(rows[:1]))
    prdp.main(command)
    assert "first 2" not in capsys.readouterr().out


def test_interrupted_run_goes_on(done):
    """Without its last mark it is trained from its checkpoint, to the same marks."""
    folder = done / "a/prdp_minibatches-seed0"
    row = json.loads((folder / "row.json").read_text())
    assert row["marks"]["compute"]["iteration"] > row["marks"]["queries"]["iteration"]
    marks = {name: mark for name, mark in row["marks"].items() if name != "compute"}
    (folder / "marks.json").write_text(json.dumps(marks))
    (folder / "row.json").unlink()
    prdp.main(["--tiny", "--only", "a", "--arms", "prdp_minibatches", "--output", str(done)])
    again = json.loads((folder / "row.json").read_text())
    assert again["curve"] == row["curve"] and again["marks"].keys() == row["marks"].keys()
    for mark, then in row["marks"].items():
        now = again["marks"][mark]
        assert (now["iteration"], now["compute"]) == (then["iteration"], then["compute"])
        assert now["kl"] == pytest.approx(then["kl"], rel=1e-4)
        for score, values in then["scores"].items():
            assert now["scores"][score] == pytest.approx(values, rel=1e-4)


def test_run_that_would_not_fit_is_left(tmp_path, capsys):
    prdp.main(
        ["--tiny", "--only", "c", "--output", str(tmp_path), "--budget_minutes", "0.001"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "is left for the next time" in out and "nothing to report" in out


def test_prompts():
    captions = prdp.captions(50)
    assert len(set(captions)) == 50 and captions == prdp.captions(50)
    assert not any(parse(c).held_out() for c in captions)
    assert all(parse(c).held_out() for c in prdp.held_out(24))
    assert len(set(prdp.held_out(24))) == 24


def test_full_plan_fits_the_prompts():
    """Minibatches divide the rollout, and no prompt of (b) comes twice."""
    args = type("Args", (), dict(only=list("abc"), arms=list(prdp.NAMES), seeds=[0, 1, 2]))()
    costs = prdp.Costs(prdp.FULL, guided=True)
    for run in prdp.plan(args, prdp.FULL):
        algorithm = prdp.make_algorithm(prdp.options(run))
        p, b = costs.batch(run)
        assert p % algorithm.minibatches == 0
        if run.experiment != "a":
            iterations = max(
                costs.budgets(run)["compute"] / costs.iteration(run),
                costs.budgets(run).get("queries", 0) / (p * b),
            )
            assert (iterations + 1) * p <= prdp.FULL.captions


# -- bench_finetune ---------------------------------------------------------------------------


def test_bench_runs(capsys):
    bench.main(["--tiny", "--no_peaks", "--parts", "passes", "pipeline"])
    out = json.loads(capsys.readouterr().out)
    one, two = (out["passes"][f"T = {n}"] for n in (1, 2))
    assert two["relative difference of gradients"] < 1e-4
    # one step's activations against those of both
    assert two["saved by one graph / by two passes"] == pytest.approx(2, rel=0.05)
    assert one["saved by one graph / by two passes"] == pytest.approx(1, rel=0.05)
    assert out["pipeline"]["images_per_second"]["engine"] > 0


def test_sized_part_needs_nothing_of_the_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffreward", None)  # importing it is an error
    bench.main(["--tiny", "--parts", "sized"])
    out = json.loads(capsys.readouterr().out)
    assert set(out["sized"]) == {n + c for n in bench.NETWORKS for c in ("", ", checkpointing")}
    full, checkpointed = out["sized"]["sd15"], out["sized"]["sd15, checkpointing"]
    assert checkpointed["further_image_mib"] < 0.5 * full["further_image_mib"]
    assert full["0.002 GB"]["images"] >= 1


def test_saved_bytes():
    a, b = (torch.randn(1000, requires_grad=True) for _ in range(2))
    with bench.SavedBytes([a, b]) as saved:
        y = a * b  # keeps a and b, which are parameters
        assert saved.now == 0
        z = y.exp()  # keeps its result
        assert saved.now == 4000
        total = (z * z).sum()  # keeps z again: the same memory
        assert saved.now == 4000
        total.backward()
    assert saved.now == 0 and saved.peak == 4000
    torch.testing.assert_close(a.grad, 2 * (2 * a * b).exp().detach() * b.detach())


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 40, 41, 1000])
@pytest.mark.parametrize("guess", [1, 30, 5000])
def test_largest(limit, guess):
    asked = []
    found = bench.largest(lambda n: asked.append(n) or n <= limit, guess)
    assert found <= limit <= found + max(1, found // 20)
    assert min(asked) >= 1 and len(asked) <= 80


@pytest.mark.parametrize(
    ("name", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)]
)  # fmt: skip
def test_networks_have_the_published_sizes(name, parameters):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(**bench.NETWORKS[name])
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_pipeline_way_has_the_policy_s_log_probabilities():
    """The scheduler's path, scored by the policy: two implementations of one law."""
    pipe = copy.deepcopy(tiny.sd())
    policy = load_policy(pipe, num_steps=4, guidance_scale=3.0)
    pipe.scheduler = bench.log_prob_scheduler(pipe.scheduler)
    prompts, k = ["red heart", "blue star"], 2
    with torch.no_grad():
        images, latents, times, log_prob = bench.pipeline_rollout(
            pipe, prompts, k, 4, 3.0, torch.Generator().manual_seed(0)
        )
        condition = policy.encode(prompts).repeat(k)
        ours = path_log_prob(policy, Trajectory(condition, latents))
        decoded = policy.decode(latents[-1], condition)
    assert [int(t) for t in times] == policy.kernel.timesteps.tolist()
    torch.testing.assert_close(log_prob, ours, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(images, decoded.data, rtol=0, atol=1e-4)


def test_sized_step_is_the_policy_s():
    """The log-probability of the one-file part, and of the package's DDIM kernel."""
    from diffreward.policies.gaussian import DDIM

    work = bench.Sized(bench.TINY_NETWORKS["sd15"], "cpu", checkpointing=False)
    given = work.inputs(2)
    with torch.no_grad():
        found = work.log_prob(given, 501, 481, 5.0)
        output = work.network(
            torch.cat([given["x"]] * 2).bfloat16(), 501, encoder_hidden_states=given["embeds"]
        ).sample.float()
        without, with_prompt = output.chunk(2)
        ab = work.alpha_bar
        kernel = DDIM(torch.tensor([501]), ab[501:502], ab[481:482], ab)
        law = kernel.law(0, given["x"], without + 5.0 * (with_prompt - without))
        full = law.log_prob(given["x_next"])
    d = given["x"][0].numel()
    constant = d * (law.std.flatten()[0].log() + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(found, full + constant, rtol=1e-4, atol=1e-2)
