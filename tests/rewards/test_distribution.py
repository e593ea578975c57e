"""Rewards of sets against closed forms, loops, brute force, other packages and recomputation."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from diffreward.rewards import kernels, neighbours
from diffreward.rewards.base import (
    SetReward,
    available_rewards,
    evaluate,
    evaluate_set,
    make_reward,
)
from diffreward.rewards.distribution import ExemplarSimilarity, Frechet, PerSampleFrechet
from diffreward.rewards.encoders import Encoder
from diffreward.rewards.exemplars import load_exemplars, save_exemplars
from diffreward.rewards.gaussians import Gaussian, frechet_of
from diffreward.rewards.kernels import MMD, RBF, Polynomial, Vendi, cosine, median_distance
from diffreward.rewards.neighbours import Neighbours
from diffreward.rewards.sliced_wasserstein import SlicedWasserstein, quantiles
from diffreward.samples import Samples


def normal(*shape, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def embed(samples):
    return samples.data


def points(rows):
    return Samples(rows, "points")


D = 3
EXEMPLARS = normal(17, D, seed=100, shift=0.3)
REFERENCE = Gaussian.of(EXEMPLARS)
MIXED = RBF((0.5, 2.0))


def overlap(x, y):
    """A kernel that is no function of an inner product."""
    return torch.exp(-(x[:, None] - y[None]).abs().sum(-1))


REWARDS = {
    "frechet": lambda: Frechet(embed, REFERENCE),
    "frechet shrunk": lambda: Frechet(embed, REFERENCE, shrinkage=0.3),
    "mmd rbf": lambda: MMD(embed, EXEMPLARS, MIXED),
    "mmd callable": lambda: MMD(embed, EXEMPLARS, overlap),
    "kid": lambda: MMD(embed, EXEMPLARS, Polynomial(), name="kid"),
    "vendi": lambda: Vendi(embed),
    "vendi log": lambda: Vendi(embed, log=True),
    "vendi 2": lambda: Vendi(embed, order=2),
    "vendi inf": lambda: Vendi(embed, order="inf"),
    "vendi 0.5": lambda: Vendi(embed, order=0.5, log=True),
    "vendi rbf": lambda: Vendi(embed, MIXED),
    "vendi rbf 2": lambda: Vendi(embed, MIXED, order=2, log=True),
    "vendi rbf 3": lambda: Vendi(embed, MIXED, order=3),
    "vendi callable": lambda: Vendi(embed, overlap),
    "precision": lambda: Neighbours("precision", embed, EXEMPLARS, 2),
    "recall": lambda: Neighbours("recall", embed, EXEMPLARS, 2),
    "density": lambda: Neighbours("density", embed, EXEMPLARS, 2),
    "coverage": lambda: Neighbours("coverage", embed, EXEMPLARS, 2),
    "sliced": lambda: SlicedWasserstein(embed, EXEMPLARS, 5),
    "sliced 1": lambda: SlicedWasserstein(embed, EXEMPLARS, 5, power=1),
    "sliced 3": lambda: SlicedWasserstein(embed, EXEMPLARS, 5, power=3),
}
HARD = {"precision", "recall", "density", "coverage"}


# -- What all of them keep ----------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("n", [4, 11])
def test_influence_is_leaving_out(name, n):
    reward = REWARDS[name]()
    x = normal(n, D, seed=n, scale=0.8)
    rest = [reward.value(torch.cat([x[:j], x[j + 1 :]])) for j in range(n)]
    expected = reward.value(x) - torch.stack(rest)
    found = reward.influence(x)
    assert found.dtype == torch.float64 and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found, SetReward.influence(reward, x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", REWARDS)
def test_no_order_no_batch_one_range(name):
    reward = REWARDS[name]()
    x = normal(12, D, seed=1).float()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    scores = evaluate_set(reward, points(x))
    shuffled = evaluate_set(reward, points(x[order]), batch=5)
    assert shuffled.total == pytest.approx(scores.total, rel=1e-9)
    torch.testing.assert_close(shuffled.value, scores.value[order], rtol=1e-7, atol=1e-9)
    low, high = reward.info.range
    assert low <= scores.total <= high
    assert reward.value(x).dtype == torch.float64
    assert reward.to("cpu") is reward
    assert reward.info.of_sets and reward.info.name == name.split()[0].replace(
        "sliced", "sliced_wasserstein"
    )


@pytest.mark.parametrize("name", sorted(REWARDS.keys() - HARD))
@pytest.mark.parametrize("n", [4, 7])
def test_gradient_is_the_finite_difference(name, n):
    reward = REWARDS[name]()
    x = normal(n, D, seed=5, scale=0.7).requires_grad_()
    assert torch.autograd.gradcheck(reward.value, x)


@pytest.mark.parametrize("name", REWARDS)
def test_equal_samples_do_no_harm(name):
    """Finite values, influences and gradients where all samples are one point, or two."""
    reward = REWARDS[name]()
    for x in (torch.ones(6, D), torch.eye(D)[[0, 0, 0, 1, 1, 1]] + 0.1):
        x = x.clone().requires_grad_()
        value = reward.value(x)
        assert value.isfinite() and reward.influence(x.detach()).isfinite().all()
        if name not in HARD:
            assert torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize("name", REWARDS)
def test_few_samples_and_wrong_features(name):
    reward = REWARDS[name]()
    few = reward.min_samples
    reward.value(normal(few, D))
    reward.influence(normal(few + 1, D))
    with pytest.raises(ValueError, match=f"{few} samples or more, but {few - 1} came"):
        reward.value(normal(few - 1, D))
    with pytest.raises(ValueError, match=f"influence of one needs {few + 1}"):
        reward.influence(normal(few, D))
    if reward.exemplars is not None:
        with pytest.raises(ValueError, match="same encoder"):
            reward.value(normal(20, D + 1))
    with pytest.raises(ValueError, match="needs an encoder that gives 6 samples a row"):
        reward.encoder = lambda samples: samples.data[:, 0]
        reward(points(normal(6, D)))


# -- Frechet ------------------------------------------------------------------------------------


def test_frechet_is_minus_the_distance():
    x = normal(30, D, shift=1.0)
    assert Frechet(embed, REFERENCE)(points(x)) == -frechet_of(x, REFERENCE)
    shrunk = Frechet(embed, REFERENCE, shrinkage=0.5)
    assert shrunk.value(x) == -frechet_of(x, REFERENCE, 0.5)


def test_frechet_warns_of_few_samples():
    reward = Frechet(embed, Gaussian.of(normal(30, 8)))
    with pytest.warns(UserWarning, match="7 samples in 8 dimensions"):
        reward.value(normal(7, 8))
    fresh = Frechet(embed, Gaussian.of(normal(30, 8)))
    shrunk = Frechet(embed, Gaussian.of(normal(30, 8)), shrinkage=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.value(normal(7, 8))  # once is enough
        fresh.value(normal(8, 8))
        shrunk.value(normal(7, 8))


def test_first_order_influence_of_frechet():
    """Of many samples, it is the exact one but for terms of second order."""
    x = normal(800, D, seed=3, scale=0.8)
    for shrinkage in (0.0, 0.2):
        exact = Frechet(embed, REFERENCE, shrinkage).influence(x)
        first = Frechet(embed, REFERENCE, shrinkage, approximate=True).influence(x)
        assert (first - exact).abs().max() < 0.02 * exact.abs().max()
        assert torch.corrcoef(torch.stack([first, exact]))[0, 1] > 0.9999


def test_extrapolated_frechet():
    x = normal(60, D, seed=3)
    reward = Frechet(embed, REFERENCE, extrapolate=True, levels=3)
    found, first = reward.influence(x), None
    first = Frechet(embed, REFERENCE, extrapolate=True, levels=3, approximate=True).influence(x)
    assert torch.corrcoef(torch.stack([first, found]))[0, 1] > 0.9
    # A sample that is far off costs more than any other
    x[7] += 10
    assert reward.influence(x).argmin() == 7 and reward.influence(x)[7] < 0
    assert reward.info.range == (-math.inf, math.inf) and reward.min_samples == 9


def test_influence_of_frechet_finds_what_does_not_belong():
    x = normal(40, D, shift=0.3)
    x[5] += 4.0
    assert Frechet(embed, REFERENCE).influence(x).argmin() == 5


# -- Kernels ------------------------------------------------------------------------------------


def test_kernels():
    x, y = normal(4, D), normal(5, D, seed=1)
    for i, j in itertools.product(range(4), range(5)):
        far, dot = (x[i] - y[j]).norm(), x[i] @ y[j]
        gauss = [math.exp(-(far**2) / (2 * b**2)) for b in (0.5, 2.0)]
        assert MIXED(x, y)[i, j].item() == pytest.approx(sum(gauss) / 2)
        assert Polynomial()(x, y)[i, j].item() == pytest.approx((dot / D + 1).item() ** 3)
        found = Polynomial(2, 0.5, 3.0)(x, y)[i, j].item()
        assert found == pytest.approx((0.5 * dot + 3).item() ** 2)
        assert cosine(x, y)[i, j].item() == pytest.approx(
            torch.cosine_similarity(x[i], y[j], dim=0).item()
        )
    pairs = [(a - b).norm().item() for a, b in itertools.combinations(EXEMPLARS, 2)]
    assert median_distance(EXEMPLARS) == pytest.approx(sorted(pairs)[(len(pairs) - 1) // 2])


@pytest.mark.parametrize("kernel", [MIXED, Polynomial(), overlap])
def test_mmd_is_a_double_loop(kernel):
    x, m, n = normal(6, D), len(EXEMPLARS), 6

    def k(a, b):
        return kernel(a[None], b[None]).item()

    def among(rows):
        return sum(k(a, b) for a, b in itertools.permutations(rows, 2))

    across = sum(k(a, b) for a, b in itertools.product(x, EXEMPLARS))
    expected = among(x) / (n * (n - 1)) - 2 * across / (n * m) + among(EXEMPLARS) / (m * (m - 1))
    assert MMD(embed, EXEMPLARS, kernel).value(x).item() == pytest.approx(-expected)


def test_mmd_is_unbiased():
    """Over sets from the exemplars' own population, all of it, its mean is exactly 0."""
    population = normal(6, D)
    values = [
        MMD(embed, population[list(chosen)], MIXED).value(population[list(rest)])
        for chosen in itertools.permutations(range(6), 4)
        for rest in [sorted(set(range(6)) - set(chosen))]
    ]
    assert abs(torch.stack(values).mean()) < 1e-12
    assert max(values) > 0 > min(values)


def test_many_exemplars_come_in_parts(monkeypatch):
    x = normal(7, D)
    whole = {name: REWARDS[name]().value(x) for name in ("mmd rbf", *HARD)}
    for module in (kernels, neighbours):
        monkeypatch.setattr(module, "ROWS", 5)
    for name, value in whole.items():
        torch.testing.assert_close(REWARDS[name]().value(x), value)


# -- Vendi --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0.5, 1, 2, 3.5, "inf"])
@pytest.mark.parametrize(
    "kernel", [cosine, RBF((1e-3,)), lambda x, y: (x[:, None] == y).all(-1).double()]
)
def test_vendi_counts_kinds(order, kernel):
    """n orthogonal vectors are n, equal ones 1; k equally frequent kinds k."""
    basis = torch.linalg.qr(normal(6, 6))[0]
    reward = Vendi(embed, kernel, order)
    assert reward.value(basis).item() == pytest.approx(6)
    assert reward.value(basis[:1].repeat(5, 1)).item() == pytest.approx(1)
    assert reward.value(basis[[0, 0, 0, 1, 1, 1, 4, 4, 4]]).item() == pytest.approx(3)
    frequent = basis[[0, 0, 0, 0, 0, 0, 1, 2]]  # 6, 1 and 1 of 8
    p = np.array([6, 1, 1]) / 8
    q = float(order)
    entropy = {1.0: stats.entropy(p), math.inf: -math.log(p.max())}
    expected = (
        entropy.get(q) or math.log((p**q).sum()) / (1 - q) if q not in entropy else entropy[q]
    )
    assert reward.value(frequent).item() == pytest.approx(math.exp(expected))
    assert Vendi(embed, kernel, order, log=True).value(frequent).item() == pytest.approx(expected)


def test_vendi_of_two():
    """Eigenvalues (1 +- c) / 2."""
    for c in (0.0, 0.3, 0.99):
        x = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c**2)]], dtype=torch.float64)
        p = np.array([1 + c, 1 - c]) / 2
        assert Vendi(embed).value(x).item() == pytest.approx(math.exp(stats.entropy(p)))


@pytest.mark.parametrize("d", [3, 20])
def test_vendi_in_features_and_in_kernels_is_one(d):
    """The same with d x d and n x n matrices: value, gradient and influence."""
    x = normal(9, d, seed=2).requires_grad_()
    for order in (1, 2, 4, 0.7, math.inf):
        one, two = Vendi(embed, order=order), Vendi(embed, lambda a, b: cosine(a, b), order)
        torch.testing.assert_close(one.value(x), two.value(x))
        gradients = [torch.autograd.grad(v.value(x), x)[0] for v in (one, two)]
        torch.testing.assert_close(*gradients)
        influences = [v.influence(x.detach()) for v in (one, two)]
        torch.testing.assert_close(*influences, rtol=1e-7, atol=1e-7)


def test_vendi_of_equal_and_wide_spectra_without_one():
    """The integral holds where leaving one out changes the rank, or next to nothing."""
    spread = normal(30, 6, seed=3) * torch.tensor([1e4, 1.0, 1.0, 1e-2, 1e-4, 1e-6])
    lone = torch.eye(6, dtype=torch.float64)[[0, 0, 0, 1, 2]]
    for x in (spread, lone, normal(40, 6, seed=4), normal(5, 6), torch.ones(4, 6)):
        reward = Vendi(embed, log=True)
        expected = SetReward.influence(reward, x.double())
        torch.testing.assert_close(reward.influence(x), expected, rtol=1e-9, atol=1e-9)


def test_first_order_influence_of_vendi():
    """(-phi^T log(rho) phi - H) / n, near the exact one for many samples."""
    x = torch.nn.functional.normalize(normal(300, 5, seed=1), dim=1)
    rho = x.T @ x / 300
    values, vectors = torch.linalg.eigh(rho)
    log_rho = vectors @ values.log().diag() @ vectors.T
    entropy = -(values * values.log()).sum()
    expected = (-torch.einsum("nd,de,ne->n", x, log_rho, x) - entropy) / 300
    first = Vendi(embed, log=True, approximate=True).influence(x)
    torch.testing.assert_close(first, expected)
    exact = Vendi(embed, log=True).influence(x)
    assert torch.corrcoef(torch.stack([first, exact]))[0, 1] > 0.999
    for order in (2, math.inf):
        first = Vendi(embed, order=order, approximate=True).influence(x)
        exact = Vendi(embed, order=order).influence(x)
        assert torch.corrcoef(torch.stack([first, exact]))[0, 1] > 0.99


def test_vendi_ascent_spreads_equal_samples():
    x = torch.ones(4, 6, dtype=torch.float64) + 1e-3 * normal(4, 6)
    for _ in range(200):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(Vendi(embed, log=True).value(x), x)
        x = (x + 0.5 * gradient).detach()
    assert Vendi(embed).value(x) > 3.9


# -- Nearest neighbours -------------------------------------------------------------------------


def brute_force(x, y, k):
    """Precision, recall, density, coverage, from their definitions."""

    def reach(rows, i):
        return sorted((rows[i] - r).norm() for j, r in enumerate(rows) if j != i)[k - 1]

    inside = [[(a - b).norm() <= reach(y, j) for j, b in enumerate(y)] for a in x]
    around = [[(a - b).norm() <= reach(x, i) for b in y] for i, a in enumerate(x)]
    return {
        "precision": sum(any(row) for row in inside) / len(x),
        "recall": sum(any(row[j] for row in around) for j in range(len(y))) / len(y),
        "density": sum(sum(row) for row in inside) / (k * len(x)),
        "coverage": sum(any(row[j] for row in inside) for j in range(len(y))) / len(y),
    }


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_neighbours_are_brute_force(k, shift):
    x = normal(9, D, seed=1, shift=shift)
    for name, expected in brute_force(x, EXEMPLARS, k).items():
        found = Neighbours(name, embed, EXEMPLARS, k).value(x).item()
        assert found == pytest.approx(expected), name


def test_what_neighbours_say():
    """Modes dropped cost recall and coverage; samples off the exemplars cost precision."""
    y = torch.cat([normal(20, D, scale=0.1), normal(20, D, seed=1, scale=0.1, shift=5.0)])
    half, off = y[:20] + 1e-3, torch.cat([y[:20] + 1e-3, normal(20, D, shift=50.0)])

    def values(x):
        return {
            name: Neighbours(name, embed, y, 3).value(x).item()
            for name in ("precision", "recall", "density", "coverage")
        }

    assert values(y)["precision"] == values(y)["recall"] == values(y)["coverage"] == 1
    assert values(half) == pytest.approx(
        {"precision": 1, "recall": 0.5, "density": values(half)["density"], "coverage": 0.5}
    )
    assert values(off)["precision"] == 0.5 and values(off)["coverage"] == 0.5


@pytest.mark.parametrize("seed", range(8))
def test_influence_on_recall_with_ties(seed):
    """On a small lattice, many distances are equal."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (12, 2), generator=generator).double()
    x = torch.randint(0, 3, (7, 2), generator=generator).double()
    for name in HARD:
        reward = Neighbours(name, embed, y, 2)
        torch.testing.assert_close(reward.influence(x), SetReward.influence(reward, x))


# -- Sliced Wasserstein -------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 7), (9, 6), (1, 3), (6, 3)])
def test_quantiles_are_the_optimal_plan(n, m):
    """In one dimension, against scipy (p = 1) and against repeating both to equal numbers (2)."""
    x, y = normal(n, seed=1).sort().values, normal(m, seed=2).sort().values
    ours, theirs, widths = quantiles(n, m)
    assert widths.sum().item() == pytest.approx(1) and len(widths) <= n + m - 1
    far = (x[ours] - y[theirs]).abs()
    assert (far @ widths).item() == pytest.approx(stats.wasserstein_distance(x, y))
    many = (x.repeat_interleave(m) - y.repeat_interleave(n)).square().mean()
    assert (far.square() @ widths).item() == pytest.approx(many.item())


@pytest.mark.parametrize("power", [1, 2, 3])
def test_sliced_wasserstein_is_its_definition(power):
    reward = SlicedWasserstein(embed, EXEMPLARS, 7, power, seed=4)
    x, total = normal(5, D), 0.0
    for direction in reward.directions.T:
        assert direction.norm().item() == pytest.approx(1)
        a = (x @ direction).sort().values.repeat_interleave(17)
        b = (EXEMPLARS @ direction).sort().values.repeat_interleave(5)
        total += ((a - b).abs() ** power).mean().item() / 7
    assert reward.value(x).item() == pytest.approx(-(total ** (1 / power)))


def test_sliced_wasserstein_of_a_shift():
    """W_2 of a shift v is |v . u| in direction u: on average over directions |v|^2 / d."""
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    reward = SlicedWasserstein(embed, EXEMPLARS, 20000)
    assert reward.value(EXEMPLARS + v).item() == pytest.approx(-v.norm().item() / 3**0.5, rel=0.02)
    assert reward.value(EXEMPLARS) == 0
    again = SlicedWasserstein(embed, EXEMPLARS, 20000)
    assert torch.equal(again.directions, reward.directions)


# -- Rewards of samples -------------------------------------------------------------------------


def test_per_sample_frechet():
    parts = normal(4, 5, 9, seed=1)  # fewer parts than dimensions
    reference = Gaussian.of(normal(60, 9, seed=2))
    reward = PerSampleFrechet(embed, reference)
    found = evaluate(reward, points(parts)).value
    expected = torch.stack([-frechet_of(rows, reference) for rows in parts])
    torch.testing.assert_close(found, expected.float())
    alone = evaluate(reward, points(parts[2:3])).value
    assert alone == found[2]
    parts.requires_grad_()
    evaluate(reward, points(parts)).value.sum().backward()
    assert parts.grad.isfinite().all() and parts.grad.abs().sum() > 0
    shrunk = PerSampleFrechet(embed, reference, 0.2)
    torch.testing.assert_close(
        evaluate(shrunk, points(parts)).value[1], -frechet_of(parts[1], reference, 0.2).float()
    )
    with pytest.raises(ValueError, match=r"\(b, n, d\) parts, but \(4, 9\)"):
        reward(points(parts[:, 0]))
    with pytest.raises(ValueError, match="8 dimensions"):
        reward(points(parts[..., :8]))


def test_exemplar_similarity():
    y = torch.eye(3)[:2] * 5
    x = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, -3.0]])
    cosines = [[1, 0], [0.5**0.5, 0.5**0.5], [0, 0]]

    def values(*options):
        return evaluate(ExemplarSimilarity(embed, y, *options), points(x)).value

    torch.testing.assert_close(values(), torch.tensor(cosines).mean(1))
    torch.testing.assert_close(values("max"), torch.tensor(cosines).amax(1))
    soft = [0.1 * math.log(sum(math.exp(c / 0.1) for c in row) / 2) for row in cosines]
    torch.testing.assert_close(values("softmax", 0.1), torch.tensor(soft))
    torch.testing.assert_close(values("softmax", 1e4), values("mean"), atol=1e-4, rtol=0)
    torch.testing.assert_close(values("softmax", 1e-4), values("max"), atol=1e-4, rtol=0)
    grad = x.clone().double().requires_grad_()
    reward = ExemplarSimilarity(embed, y, "softmax", 0.3)
    evaluate(reward, points(grad)).value.sum().backward()
    assert grad.grad[0, 1] > 0 == grad.grad[1, 2]
    with pytest.raises(ValueError, match="same encoder"):
        reward(points(x[:, :2]))


# -- Other packages -----------------------------------------------------------------------------


def test_parity_with_vendi_score():
    vendi = pytest.importorskip("vendi_score.vendi")
    x = normal(20, 6, seed=1).numpy()
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    for order in (1, 2, 0.5, "inf"):
        found = Vendi(embed, order=order).value(torch.from_numpy(x)).item()
        assert found == pytest.approx(vendi.score_dual(x, q=order))
    kernel = MIXED(torch.from_numpy(units), torch.from_numpy(units)).numpy()
    from scipy import linalg  # score_K asks for a namespace that newer releases do not have

    expected = math.exp(vendi.entropy_q(linalg.eigvalsh(vendi.weight_K(kernel))))
    assert Vendi(embed, MIXED).value(torch.from_numpy(units)).item() == pytest.approx(expected)


def test_parity_with_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    x, y = normal(60, 5, seed=1), normal(60, 5, seed=2, scale=1.3, shift=0.2)
    reference = Gaussian.of(y)
    statistics = [metric_fid.fid_features_to_statistics(rows) for rows in (x, y)]
    fid = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert Frechet(embed, reference).value(x).item() == pytest.approx(-fid)
    kid = metric_kid.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, verbose=False)[
        "kernel_inception_distance_mean"
    ]
    found = MMD(embed, y, Polynomial(), name="kid").value(x).item()
    assert found == pytest.approx(-kid)
    prc = metric_prc.prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False)
    for name in ("precision", "recall"):
        assert Neighbours(name, embed, y, 3).value(x).item() == pytest.approx(prc[name], rel=1e-6)


# -- From the registry --------------------------------------------------------------------------


class Points(Encoder):
    """An encoder of points, whose parts are its coordinates."""

    name, key, modality, differentiable = "points", "points 1", "points", True

    def __call__(self, samples):
        return samples.data

    def parts(self, samples):
        return samples.data.unflatten(1, (-1, 1))


def test_options_build_what_they_say():
    """Each name, with exemplars as samples, as its class on their features."""
    x, y = normal(9, D, seed=8).float(), EXEMPLARS.float()
    encoder, exemplars = Points(), points(y)
    gaussian = Gaussian.of(y)
    for spec, expected in [
        ({"name": "frechet"}, Frechet(embed, gaussian)),
        (
            {"name": "frechet", "shrinkage": 0.25},
            Frechet(embed, Gaussian.of(y, 0.25), 0.25),
        ),
        (
            {"name": "frechet", "extrapolate": True, "levels": 2},
            Frechet(embed, gaussian, extrapolate=True, levels=2),
        ),
        ({"name": "mmd"}, MMD(embed, y, RBF((median_distance(y),)))),
        ({"name": "mmd", "bandwidth": [0.5, 2.0]}, MMD(embed, y, MIXED)),
        (
            {"name": "mmd", "kernel": "polynomial", "degree": 2, "gamma": 0.1, "offset": 2.0},
            MMD(embed, y, Polynomial(2, 0.1, 2.0)),
        ),
        ({"name": "mmd", "kernel": overlap}, MMD(embed, y, overlap)),
        ({"name": "kid"}, MMD(embed, y, Polynomial(), name="kid")),
        ({"name": "precision"}, Neighbours("precision", embed, y, 3)),
        ({"name": "recall", "k": 2}, Neighbours("recall", embed, y, 2)),
        ({"name": "density"}, Neighbours("density", embed, y, 5)),
        ({"name": "coverage"}, Neighbours("coverage", embed, y, 5)),
        (
            {"name": "sliced_wasserstein", "projections": 9, "power": 1, "seed": 3},
            SlicedWasserstein(embed, y, 9, 1, 3),
        ),
    ]:
        reward = make_reward({**spec, "exemplars": exemplars, "encoder": encoder})
        found = evaluate_set(reward, points(x))
        assert found.total == pytest.approx(expected.value(x).item(), rel=1e-6), spec
        torch.testing.assert_close(found.value, expected.influence(x), rtol=1e-5, atol=1e-8)
        assert reward.info.name == spec["name"] and reward.info.modality == "points"
        assert reward.info.differentiable is (spec["name"] not in HARD)
        assert available_rewards()[spec["name"]].of_sets
        with pytest.raises(ValueError, match="scores points samples"):
            evaluate_set(reward, Samples(x, "other"))
    for spec, expected in [
        ({"name": "vendi"}, Vendi(embed)),
        ({"name": "vendi", "order": "inf", "log": True}, Vendi(embed, order=math.inf, log=True)),
        ({"name": "vendi", "kernel": "rbf", "bandwidth": [0.5, 2]}, Vendi(embed, MIXED)),
        ({"name": "vendi", "kernel": overlap}, Vendi(embed, overlap)),
    ]:
        reward = make_reward({**spec, "encoder": encoder})
        assert evaluate_set(reward, points(x)).total == pytest.approx(expected.value(x).item())
    reward = make_reward(
        "exemplar_similarity", exemplars=exemplars, encoder=encoder, aggregate="max"
    )
    similar = evaluate(ExemplarSimilarity(embed, y, "max"), points(x)).value
    torch.testing.assert_close(evaluate(reward, points(x)).value, similar)
    reward = make_reward("per_sample_frechet", exemplars=exemplars, encoder=encoder, shrinkage=0.1)
    coordinates = Gaussian.of(y.reshape(-1, 1), 0.1)
    expected = [-frechet_of(row[:, None], coordinates, 0.1) for row in x]
    torch.testing.assert_close(evaluate(reward, points(x)).value, torch.stack(expected).float())
    assert reward.to("cpu") is reward


def test_exemplars_that_are_statistics_only(tmp_path):
    encoder, path = Points(), tmp_path / "points.safetensors"
    save_exemplars(path, load_exemplars(points(EXEMPLARS), encoder, features=False))
    x = normal(9, D)
    found = make_reward("frechet", exemplars=str(path), encoder=encoder).value(x)
    assert found.item() == pytest.approx(Frechet(embed, REFERENCE).value(x).item(), rel=1e-5)
    for name in ("mmd", "kid", "precision", "sliced_wasserstein", "exemplar_similarity"):
        with pytest.raises(ValueError, match=f"{name}' compares with each exemplar"):
            make_reward(name, exemplars=str(path), encoder=encoder)
    with pytest.raises(ValueError, match="no statistics of parts"):
        make_reward("per_sample_frechet", exemplars=str(path), encoder=encoder)


def test_bad_specs():
    encoder, exemplars = Points(), points(EXEMPLARS)
    for name, options, message in [
        ("vendi", {"kernel": "rbf"}, "needs a bandwidth"),
        ("vendi", {"kernel": "linear"}, "cosine, rbf or a callable, but 'linear'"),
        ("vendi", {"kernel": "rbf", "bandwidth": 0}, "above zero"),
        ("mmd", {"kernel": "cubic", "exemplars": exemplars}, "rbf, polynomial or a callable"),
        ("mmd", {"bandwidth": [], "exemplars": exemplars}, "one bandwidth or more"),
        ("frechet", {"shrinkage": 2.0, "exemplars": exemplars}, "0 to 1"),
        ("frechet", {}, "needs the option exemplars"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_reward(name, encoder=encoder, **options)


# -- Bad input ----------------------------------------------------------------------------------


def test_bad_options():
    for call, message in [
        (lambda: Frechet(embed, REFERENCE, shrinkage=2), "0 to 1, but 2"),
        (lambda: PerSampleFrechet(embed, REFERENCE, -1), "0 to 1, but -1"),
        (lambda: MMD(embed, EXEMPLARS[:1], MIXED), "2 exemplars or more, but 1"),
        (lambda: Vendi(embed, order=0), "above 0 or inf, but 0"),
        (lambda: Vendi(embed, order="many"), "but 'many'"),
        (lambda: Neighbours("recall", embed, EXEMPLARS, 0), "k of 1 or more"),
        (lambda: Neighbours("density", embed, EXEMPLARS, 17), "18 exemplars or more, but 17"),
        (lambda: SlicedWasserstein(embed, EXEMPLARS, 0), "1 projection"),
        (lambda: SlicedWasserstein(embed, EXEMPLARS, 4, 0), "power of 1"),
        (lambda: ExemplarSimilarity(embed, EXEMPLARS, "min"), "mean, max, softmax, but 'min'"),
        (lambda: ExemplarSimilarity(embed, EXEMPLARS, "softmax", 0), "temperature"),
        (lambda: median_distance(torch.ones(5, 2)), "no median distance"),
        (lambda: Frechet(embed, REFERENCE).value(normal(5, D, 2)), r"features \(n, d\)"),
        (lambda: Vendi(embed).value(torch.eye(3)[[0, 1]] * torch.tensor([[1.0], [0]])), "sample 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_kernels():
    x = normal(5, D)
    for kernel, message in [
        (lambda a, b: a @ b.T, "1 of a sample with itself"),
        (lambda a, b: torch.ones(5, 4), r"shape \(5, 4\) for 5 samples"),
        (lambda a, b: 1 - torch.cdist(a, b), "positive semi-definite"),
        (
            lambda a, b: torch.eye(5).index_put_(
                (torch.tensor(0), torch.tensor(1)), torch.tensor(0.5)
            ),
            "symmetric",
        ),
    ]:
        for call in (Vendi(embed, kernel).value, Vendi(embed, kernel).influence):
            with pytest.raises(ValueError, match=message):
                call(x)


def test_the_median_distance_is_of_all_parts_of_the_exemplars():
    rows = torch.linspace(0, 1, 3000)[:, None]
    for at_most in (100, 1000):  # |x - y| of uniform x, y has the median 1 - sqrt(1/2)
        assert abs(median_distance(rows, at_most) - (1 - 0.5**0.5)) < 0.02
