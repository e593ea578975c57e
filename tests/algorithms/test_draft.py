"""DRaFT and AlignProp against closed forms on a linear chain."""

import copy
import math

import pytest
import tiny
import torch
from linear_chain import LinearChain, gradients, noise, prompts, quadratic, scorer
from peft import LoraConfig
from toys import ARChain

from diffreward.algorithms import make_algorithm
from diffreward.algorithms.draft import AlignProp, DRaFT
from diffreward.policies import load_policy
from diffreward.policy import randn, rollout, sample_generators
from diffreward.rewards import as_reward
from diffreward.rewards.base import RewardInfo

T = 5
CLOSE = {"rtol": 1e-6, "atol": 1e-8}  # rewards are float32, but the gradient of their sum is exact


def centres(policy, names):
    return policy.encode(names).tensors["centre"]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, None])
def test_gradient_is_that_of_the_last_steps(eta, checkpoint, steps):
    policy, names = LinearChain(eta), prompts(4)
    x, *z = noise(4, T + 1)
    c = centres(policy, names)
    xs = policy.path(c, x, z)
    expected = policy.reward_gradient(c, xs, T - (steps or T))
    algorithm = DRaFT(steps=steps, weight=0.5, checkpoint=checkpoint)
    found, losses = gradients(algorithm, policy, names)
    torch.testing.assert_close(found, -0.5 * expected, **CLOSE)
    r = -((xs[-1] - c) ** 2).sum(1) / 2
    torch.testing.assert_close(losses, (-0.5 * r).float())


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_whole_chain_is_autograd_through_the_rollout(eta):
    policy, names = LinearChain(eta), prompts(3)
    found, _ = gradients(DRaFT(steps=None), policy, names)
    condition = policy.encode(names)
    final = rollout(policy, condition, sample_generators(0, 1, 3), differentiable=True).final
    reward = -((final - condition.tensors["centre"]) ** 2).sum() / 2
    reward.backward()
    torch.testing.assert_close(found.sum(0), -policy.gradient(), **CLOSE)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("steps", [1, 3, None])
def test_only_the_last_steps_are_recorded(steps, checkpoint):
    policy = LinearChain(1.0)
    condition, k = policy.encode(prompts(3)), steps or T
    algorithm = DRaFT(steps=steps, checkpoint=checkpoint)
    loss, _, _ = algorithm.loss(policy, condition, sample_generators(0, 1, 3), scorer())
    assert policy.denoiser.calls == [(i, 3, i >= T - k) for i in range(T)]
    loss.mean().backward()
    again = [(i, 3, True) for i in reversed(range(T - k, T))] if checkpoint else []
    assert policy.denoiser.calls[T:] == again


class Saved:
    """Bytes of float tensors that autograd keeps while it is open."""

    def __enter__(self):
        self.kept = 0

        def pack(x):
            self.kept += x.numel() * x.element_size()
            return x

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


def test_memory_is_that_of_the_recorded_steps():
    def kept(**options):
        policy = LinearChain(1.0, dim=1000)
        condition = policy.encode(prompts(3))
        with Saved() as saved:
            DRaFT(**options).loss(policy, condition, sample_generators(0, 1, 3), scorer())
        return saved.kept

    one, two, three = (kept(steps=k) for k in (1, 2, 3))
    assert three - two == two - one > 0


def lv_expected(policy, names, draws, extra):
    """The average of the chain's own gradient and of those of the renoised last step."""
    c = centres(policy, names)
    xs = policy.path(c, draws[0], draws[1 : T + 1])
    total = policy.reward_gradient(c, xs, T - 1)
    w, b = policy.denoiser.w.detach()[-1], policy.denoiser.b.detach()[-1]
    for k in range(extra):
        eps, z = draws[T + 1 + 2 * k : T + 3 + 2 * k]
        before = policy.a[-1] * xs[-1] + policy.s[-1] * eps
        after = (policy.P[-1] + policy.Q[-1] * w) * before + policy.Q[-1] * b * c
        after = after + policy.std[-1] * z
        flow = -(after - c) * policy.Q[-1]
        total[:, 0, -1] += (flow * before).sum(1)
        total[:, 1, -1] += (flow * c).sum(1)
    return total / (1 + extra)


@pytest.mark.parametrize("end", [1.0, 0.95])
@pytest.mark.parametrize("extra", [1, 2])
def test_low_variance_gradient_for_given_noise(extra, end):
    policy, names = LinearChain(1.0, end=end), prompts(3)
    expected = lv_expected(policy, names, noise(3, T + 1 + 2 * extra), extra)
    found, _ = gradients(DRaFT(extra=extra), policy, names)
    torch.testing.assert_close(found, -expected, **CLOSE)
    assert sum(recorded for *_, recorded in policy.denoiser.calls) == 1 + extra


def test_low_variance_scores_are_those_of_the_sample_itself():
    policy, names = LinearChain(1.0), prompts(3)
    condition = policy.encode(names)
    _, samples, scores = DRaFT(extra=2).loss(
        policy, condition, sample_generators(0, 1, 3), scorer()
    )
    final = rollout(policy, condition, sample_generators(0, 1, 3)).final
    torch.testing.assert_close(samples.data, final)
    r = -((final - condition.tensors["centre"]) ** 2).sum(1) / 2
    torch.testing.assert_close(scores.value, r.float())


def last_step_moments(policy, names):
    """E and E of the square of x[T - 1] along the chain, and of x[T] renoised; 1 dimension."""
    w, b = policy.denoiser.w.detach(), policy.denoiser.b.detach()
    c = centres(policy, names)[:, 0]
    mean, var, xs = torch.zeros_like(c), torch.ones_like(c), []
    for i in range(T):
        xs.append((mean, var))
        A = policy.P[i] + policy.Q[i] * w[i]
        mean, var = A * mean + policy.Q[i] * b[i] * c, A**2 * var + policy.std[i] ** 2
    a, s = policy.a[-1], policy.s[-1]
    return xs[-1], (a * mean, a**2 * var + s**2)


def mean_gradient(policy, names, moments):
    """E of the gradient of the last step's (w, b) where x[T - 1] has these moments."""
    w, b = policy.denoiser.w.detach()[-1], policy.denoiser.b.detach()[-1]
    c, (mean, var) = centres(policy, names)[:, 0], moments
    A, B = policy.P[-1] + policy.Q[-1] * w, policy.Q[-1] * b * c - c
    square = var + mean**2
    return -policy.Q[-1] * torch.stack([A * square + B * mean, (A * mean + B) * c], 1)


@pytest.mark.parametrize("exact", [False, True])
def test_low_variance_gradient_in_expectation(exact):
    """Unbiased for DRaFT-1 where the chain has the marginals of noising; else of a known bias.

    A^2 + std^2 = 1 keeps every x[i] in N(0, 1), and so does noising. The variance of the average
    of 1 + n gradients falls in both cases.
    """
    policy, n = LinearChain(1.0, end=0.95, dim=1), 6000
    if exact:
        with torch.no_grad():
            kept = (1 - policy.std**2).sqrt()
            policy.denoiser.w.copy_((kept - policy.P) / policy.Q)
            policy.denoiser.b.zero_()
    names = ["0.8"] * n
    condition, generators = policy.encode(names), sample_generators(0, 1, n)
    chain, again = last_step_moments(policy, names[:1])
    one, other = (mean_gradient(policy, names[:1], m)[0] for m in (chain, again))
    if exact:
        torch.testing.assert_close(one, other)
    else:
        assert (one - other).abs().max() > 0.05

    def sampled(extra):
        """Per-sample gradients at the last step, from the parameters' copies per sample."""
        draws = [randn((n, 1), generators, dtype=torch.float64) for _ in range(T + 1 + 2 * extra)]
        return lv_expected(policy, names, draws, extra)[:, :, -1]

    # `lv_expected` is what the loss gives (test above); the loss itself is checked on the mean
    plain, averaged = sampled(0), sampled(3)
    for found, expected in ((plain, one), (averaged, (one + 3 * other) / 4)):
        error = (found.mean(0) - expected).abs()
        assert (error < 4 * found.std(0) / math.sqrt(n)).all()
    assert (averaged.var(0) < plain.var(0)).all()
    loss, _, _ = DRaFT(extra=3).loss(policy, condition, sample_generators(1, 1, n), scorer())
    loss.mean().backward()
    error = (-policy.gradient()[:, -1] - (one + 3 * other) / 4).abs()
    assert (error < 4 * averaged.std(0) / math.sqrt(n)).all()


def test_random_truncation_follows_the_normal_law():
    """At 50 steps: first ~ floor(N(42, 5)) on 0..49, as in the authors' code."""
    n = 20_000
    algorithm = make_algorithm({"name": "alignprop", "preset": "normal"})
    first = algorithm.first(50, n, torch.Generator().manual_seed(0))
    assert first.min() >= 0 and first.max() == 49

    def below(x):
        return 0.5 * (1 + math.erf((x - 42) / 5 / math.sqrt(2)))

    mass = below(50) - below(0)
    counts = torch.bincount(first, minlength=50)
    for i in range(50):
        p = (below(i + 1) - below(i)) / mass
        assert abs(counts[i] - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1


@pytest.mark.parametrize(("preset", "lowest"), [("uniform", 30), ("paper", 0)])
def test_random_truncation_follows_the_uniform_law(preset, lowest):
    n = 20_000
    algorithm = make_algorithm({"name": "alignprop", "preset": preset})
    first = algorithm.first(50, n, torch.Generator().manual_seed(0))
    counts, p = torch.bincount(first, minlength=50), 1 / (50 - lowest)
    assert counts[:lowest].sum() == 0
    assert (counts[lowest:] - n * p).abs().max() < 5 * math.sqrt(n * p)


def test_random_truncation_of_a_chain_of_one_step():
    for truncation in ("normal", "uniform"):
        assert AlignProp(truncation=truncation).first(1, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("split", [None, 1, 3])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_each_sample_has_its_own_truncation_whatever_the_batch(split, checkpoint):
    policy, n = LinearChain(0.7), 8
    names = prompts(n)
    algorithm = AlignProp(truncation="uniform", weight=2.0, checkpoint=checkpoint)
    generators = sample_generators(0, 1, n)
    x = randn((n, 2), generators, dtype=torch.float64)
    first = algorithm.first(T, n, generators)
    z = [randn((n, 2), generators, dtype=torch.float64) for _ in range(T)]
    assert len(first.unique()) >= 3 and first[0] != first[-1]
    c = centres(policy, names)
    expected = policy.reward_gradient(c, policy.path(c, x, z), first)
    found, _ = gradients(algorithm, policy, names, split=split)
    torch.testing.assert_close(found, -2 * expected, **CLOSE)


def test_random_truncation_records_no_more_than_it_needs():
    policy, n = LinearChain(1.0), 8
    algorithm, generators = AlignProp(truncation="uniform"), sample_generators(0, 1, n)
    randn((n, 2), generators, dtype=torch.float64)
    first = algorithm.first(T, n, generators)
    algorithm.loss(policy, policy.encode(prompts(n)), sample_generators(0, 1, n), scorer())
    calls = policy.denoiser.calls
    assert sum(rows for _, rows, recorded in calls if recorded) == (T - first).sum()
    assert sum(rows for _, rows, _ in calls) == n * T


@pytest.mark.parametrize("split", [1, 2])
def test_draft_does_not_depend_on_the_batch(split):
    policy, names = LinearChain(1.0), prompts(4)
    algorithm = DRaFT(extra=2)
    together, alone = (gradients(algorithm, policy, names, split=k)[0] for k in (None, split))
    torch.testing.assert_close(together, alone, **CLOSE)


@pytest.mark.parametrize(
    "algorithm",
    [DRaFT(steps=None), DRaFT(), DRaFT(extra=2), AlignProp(truncation="uniform")],
    ids=["draft", "draft_1", "draft_lv", "alignprop"],
)
def test_training_reaches_the_best_reward(algorithm):
    """The last step's noise, of variance std^2 in each dimension, cannot be removed: -std^2."""
    policy = LinearChain(1.0, end=0.95)
    names = ["0.8", "-0.5"] * 16
    best = -(policy.std[-1] ** 2).item()
    optimiser = torch.optim.Adam(policy.denoiser.parameters(), lr=0.2)
    condition, generator = policy.encode(names), torch.Generator().manual_seed(0)
    rewards = []
    for _ in range(250):
        loss, _, scores = algorithm.loss(policy, condition, generator, scorer())
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        rewards.append(scores.value.mean().item())
    assert rewards[0] < best - 0.5
    late = sum(rewards[-50:]) / 50
    assert abs(late - best) < 0.1 * abs(best) + 0.01


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_pipelines(family):
    """Through a real network, guidance and VAE: adapters alone learn, checkpointed or not."""
    pipe = copy.deepcopy(getattr(tiny, family)())  # others share the builder's
    policy = load_policy(pipe, num_steps=3, height=16, width=16)
    targets = ["to_q", "to_v"]
    policy.denoiser.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    condition = policy.encode(["a cat", "dog on a log"])
    brightness = scorer(as_reward(lambda samples: samples.data.mean((1, 2, 3))))

    def gradient(algorithm):
        generators = sample_generators(0, 1, 2)
        policy.denoiser.zero_grad()
        with torch.enable_grad():
            loss, samples, scores = algorithm.loss(policy, condition, generators, brightness)
            loss.mean().backward()
        named = [(n, p.grad) for n, p in policy.denoiser.named_parameters() if p.grad is not None]
        assert named and all("lora" in n for n, _ in named)
        return torch.cat([g.flatten() for _, g in named]), samples, scores

    for options in ({"steps": 2}, {"steps": 1, "extra": 1}):
        plain, samples, _ = gradient(DRaFT(**options))
        assert plain.isfinite().all() and plain.abs().max() > 0
        again, same, _ = gradient(DRaFT(**options, checkpoint=True))
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-7)
        assert torch.equal(samples.data, same.data)


def test_rewards_without_gradient_are_refused():
    for algorithm in (DRaFT(), AlignProp()):
        name = type(algorithm).__name__
        dead = as_reward(lambda s: s.data.sum(1), RewardInfo("jpeg", differentiable=False))
        with pytest.raises(ValueError, match=f"{name} needs a differentiable.*'jpeg'.*use prdp"):
            algorithm.check(dead)
        algorithm.check(quadratic())
        policy = LinearChain()
        rounded = scorer(as_reward(lambda s: s.data.detach().sum(1)))
        args = (policy, policy.encode(["1"]), sample_generators(0, 1, 1))
        with pytest.raises(ValueError, match=f"{name} needs a gradient, and the rewards have none"):
            algorithm.loss(*args, rounded)
        with torch.no_grad(), pytest.raises(ValueError, match="gradients are switched off"):
            algorithm.loss(*args, scorer())


def test_infinite_rewards_are_refused():
    policy = LinearChain()
    score = scorer(as_reward(lambda s: s.data.sum(1) + torch.tensor([0.0, -math.inf])))
    with pytest.raises(ValueError, match="reward -inf of a sample for '2'"):
        DRaFT().loss(policy, policy.encode(["1", "2"]), sample_generators(0, 1, 2), score)


def test_options_out_of_range():
    for options, says in [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"extra": -1}, "extra must be 0 or more"),
        ({"steps": 2, "extra": 1}, "goes with steps=1, but steps=2"),
        ({"steps": None, "extra": 1}, "goes with steps=1"),
        ({"weight": 0.0}, "weight must be positive"),
        ({"weight": math.nan}, "weight must be positive"),
    ]:
        with pytest.raises(ValueError, match=says):
            DRaFT(**options)
    for options, says in [
        ({"mean": 1.5}, "mean must lie in"),
        ({"std": 0.0}, "std must be positive"),
        ({"low": 0.5, "high": 0.5}, "low and high"),
        ({"weight": -1.0}, "weight must be positive"),
    ]:
        with pytest.raises(ValueError, match=says):
            AlignProp(**options)
    policy = LinearChain()
    args = (policy.encode(["1"]), sample_generators(0, 1, 1), scorer())
    with pytest.raises(ValueError, match="steps=6 .*the chain has 5"):
        DRaFT(steps=6).loss(policy, *args)
    with pytest.raises(ValueError, match="ARChain cannot"):
        DRaFT(extra=1).loss(ARChain(), *args)


def test_presets():
    for name in ("draft", "draft_1", "draft_lv"):
        assert isinstance(make_algorithm({"name": "draft", "preset": name}), DRaFT)
    assert make_algorithm({"name": "draft", "preset": "draft_lv"}).extra == 2
    assert make_algorithm("alignprop").family == "pathwise"
