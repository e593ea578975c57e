"""The experiment and the benchmark of DRAKES run, and compare like with like."""

import json
from dataclasses import replace

import bench_drakes as bench
import reproduce_drakes as drakes
import torch

# -- reproduce_drakes ---------------------------------------------------------------------------


def test_experiment_runs_and_counts(tmp_path, capsys):
    """A row of each kind of method; what a sequence costs is known."""
    argv = ["--tiny", "--tasks", "protein", "--seeds", "0", "--output", str(tmp_path)]
    argv += ["--methods", "pretrained", "best_of_k", "cfg", "tds", "svdd", "drakes"]
    drakes.main(argv)
    t, k, m = 3, drakes.TINY.particles, drakes.TINY.branches
    rows = {}
    for path in (tmp_path / "protein").glob("*/row.json"):
        row = json.loads(path.read_text())
        rows[row["method"]] = row
        letters = (path.parent / "samples.fasta").read_text().split("\n")[1::2]
        assert [len(s) for s in letters] == [76, 76]
    cost = {method: row["compute_per_sequence"] for method, row in rows.items()}
    assert cost["pretrained"] == cost["drakes"] == t
    assert cost["best_of_k"] == k * t
    assert cost["cfg"] == 2 * t
    assert cost["svdd"] == 1 + (t - 1) * m
    # one of the three steps is differentiated: x[2], scored at 80 % of the chain, is the last one's
    assert k * t <= cost["tds"] <= 3 * k * t
    assert rows["best_of_k"]["metrics"]["oracle"] > rows["pretrained"]["metrics"]["oracle"]
    assert rows["drakes"]["training_compute"] > 0 and rows["drakes"]["kl"] > 0
    assert all(0 <= row["metrics"]["recovery"] <= 1 for row in rows.values())
    capsys.readouterr()
    drakes.main([*argv, "--report"])
    shown = capsys.readouterr().out
    assert all(drakes.NAMES[method] in shown for method in rows)
    assert (tmp_path / "drakes_protein.png").exists()
    done = (tmp_path / "protein" / "pretrained-seed0" / "row.json").stat().st_mtime_ns
    drakes.main(argv)  # nothing is left to do
    assert (tmp_path / "protein" / "pretrained-seed0" / "row.json").stat().st_mtime_ns == done


def test_grid_chooses_by_the_oracle(tmp_path):
    sizes = replace(drakes.TINY, lmbdas=(1.0, 2.0, 3.0))
    lab = drakes.Lab("protein", sizes, tmp_path)
    for lmbda, oracle in ((1.0, -2.0), (2.0, -1.0), (3.0, -1.5)):
        run = drakes.Run("protein", "smc", drakes.TUNING_SEED, lmbda)
        (tmp_path / run.name).mkdir(parents=True)
        row = {"metrics": {"oracle": oracle}}
        (tmp_path / run.name / "row.json").write_text(json.dumps(row))
    assert lab.setting(drakes.Run("protein", "smc", 0)) == 2.0
    assert lab.setting(drakes.Run("protein", "pretrained", 0)) is None


# -- bench_drakes -------------------------------------------------------------------------------


def test_bench_runs(capsys):
    bench.main(["--tiny", "--no_peaks"])
    found = json.loads(capsys.readouterr().out)["dna"]
    assert found["update"]["relative difference of gradients"] < 1e-5
    saved = found["update"]["saved_mib"]
    assert saved[bench.CHECKPOINTED] < saved[bench.DEFAULT] < saved[bench.PLAIN]
    rates = found["sampling"]["T = 4, l = 20"]["sequences_per_second"]
    assert set(rates) == {"every call", "reused", "first hitting"} and min(rates.values()) > 0


def test_default_is_unbiased():
    """Over the draws of early steps, the mean gradient is that of the published procedure."""
    case = bench.Case("dna_tiny", "gc_content", 1, 6, 2)
    work = bench.Update(case, "cpu")
    torch.nn.init.normal_(work.parameters[-1])  # far from the reference
    work.generators = lambda: None  # the same draws of the chain, whichever steps are chosen

    def gradient(chosen):
        algorithm = bench.DRAKES(steps=2, early=2)
        object.__setattr__(algorithm, "_with_kl", lambda *_: (chosen, 4 / 2))
        torch.manual_seed(3)
        loss, _, _ = algorithm.loss(
            work.policy, work.condition, None,
            lambda samples: bench.evaluate(work.reward, samples), work.reference,
        )  # fmt: skip
        return work.gradient(loss)

    pairs = [(i, j) for i in range(4) for j in range(i)]
    each = []
    for pair in pairs:
        chosen = torch.zeros(1, 4, dtype=torch.bool)
        chosen[0, list(pair)] = True
        each.append(gradient(chosen))
    torch.manual_seed(3)
    whole = work.plain()
    assert max((g - whole).norm() for g in each) > 1e-3 * whole.norm()
    torch.testing.assert_close(torch.stack(each).mean(0), whole, rtol=1e-3, atol=1e-7)
