"""What experiments share: runs are found again, sizes are not mixed, intervals are right."""

import math
from dataclasses import dataclass

import experiment
import numpy as np
import pytest
import torch
from scipy import stats


@dataclass(frozen=True)
class Sizes:
    steps: int = 3
    rates: tuple[float, ...] = (0.1, 1.0)


def test_a_run_is_done_when_its_row_is_there(tmp_path):
    (tmp_path / "one").mkdir()
    assert experiment.load(tmp_path, "one") is None and experiment.load(tmp_path, "two") is None
    (tmp_path / "one" / "row.json").write_text('{"a": [1]}')
    assert experiment.load(tmp_path, "one") == {"a": [1]}


@pytest.mark.parametrize(
    ("sizes", "other", "message"),
    [
        (Sizes(), Sizes(4), r"have steps 3 \(now 4\); choose another --output"),
        ({"a": Sizes(), "b": Sizes()}, {"a": Sizes(), "b": Sizes(4)}, "have b .*choose another"),
        ({"a": Sizes(), "b": Sizes()}, {"a": Sizes()}, "have other sizes"),
    ],
)
def test_sizes_are_not_mixed(sizes, other, message, tmp_path):
    experiment.same_sizes(tmp_path, sizes)
    kept = (tmp_path / "sizes.json").read_bytes()
    experiment.same_sizes(tmp_path, sizes)
    with pytest.raises(SystemExit, match=message):
        experiment.same_sizes(tmp_path, other)
    assert (tmp_path / "sizes.json").read_bytes() == kept


def test_data_come_back(tmp_path):
    data = torch.arange(6).view(2, 3).T
    experiment.save_data(tmp_path / "new" / "x.safetensors", data)
    assert torch.equal(experiment.load_data(tmp_path / "new" / "x.safetensors"), data)


def test_interval():
    """Of one seed, that of a mean over units; more seeds that differ widen it."""
    rng = np.random.default_rng(1)
    d = rng.normal(0.3, 1.0, (1, 400))
    mean, low, high = experiment.interval(d)
    half = stats.t.ppf(0.975, 399) * d.std(ddof=1) / 20
    assert math.isclose(mean, d.mean()) and math.isclose(high - low, 2 * half, rel_tol=0.1)
    assert experiment.interval(np.full((3, 8), 0.25)) == pytest.approx((0.25, 0.25, 0.25))
    apart = d + np.array([[-1.0], [0.0], [1.0]])
    _, low3, high3 = experiment.interval(apart)
    assert high3 - low3 > 3 * (high - low)


def test_interval_covers_the_mean_of_a_two_way_layout():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        rows = rng.normal(size=(6, 1)) + rng.normal(size=(1, 80)) + 0.5
        mean, low, high = experiment.interval(rows, draws=400)
        assert mean == pytest.approx(rows.mean()) and low < mean < high
        hits += low < 0.5 < high
    assert hits >= 45  # few seeds: less than 95 %, and far more than if seeds did not count
