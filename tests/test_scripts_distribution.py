"""The benchmark of set rewards runs, and compares like with like."""

import json

import bench_distribution as bench
import torch


def test_all_ways_give_one_value(capsys):
    bench.main(["--tiny", "--no_peaks"])
    found = json.loads(capsys.readouterr().out)
    for part in ("frechet", "vendi"):
        for n, d in bench.TINY:
            row = found[part][f"n = {n}, d = {d}"]
            apart = row["relative difference of values"]
            assert all(difference < 1e-6 for difference in apart.values())
            assert min(row["seconds"].values()) > 0 < row["influence of all over the value"]
        assert part == "vendi" or set(apart) == {bench.NEW, bench.SQRTM}
    assert found["stream"]["5000 of d = 16"]["per_second"] > 0


def test_peak_of_a_way(capsys):
    for name in (bench.LOADED, bench.SQRTM, bench.INFLUENCE):
        bench.main(["--parts", "frechet", "--sizes", "30x16", "--peak_of", name])
        assert float(capsys.readouterr().out) > 10


def test_stream_is_what_it_says():
    moments = bench.streamed(2500, 8, 1000)
    rows = bench.embeddings(1000, 8, seed=3)
    rows = torch.cat([rows, rows, rows[:500]]).double()
    assert moments.count == 2500
    torch.testing.assert_close(moments.gaussian().covariance, torch.cov(rows.T))


def test_embeddings_have_a_spectrum():
    values = torch.linalg.eigvalsh(torch.cov(bench.embeddings(20000, 6, 1).double().T)).flip(0)
    torch.testing.assert_close(values, 1 / torch.arange(1, 7).double(), rtol=0.05, atol=0.0)
