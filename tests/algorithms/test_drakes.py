"""DRAKES against closed forms on a linear chain, and enumeration on a masked one."""

import math

import pytest
import token_toys
import torch
from linear_chain import LinearChain, noise, prompts, scorer
from token_toys import TokenChain

from diffreward.algorithms import make_algorithm
from diffreward.algorithms.drakes import DRAKES, _official_kl
from diffreward.finetuning import finetune
from diffreward.policy import rollout, sample_generators
from diffreward.rewards import Scores, as_reward

T = 5


def other_chain(eta=1.0):
    policy = LinearChain(eta)
    with torch.no_grad():
        policy.denoiser.w.sub_(0.1)
        policy.denoiser.b.add_(0.2)
    return policy


def run(algorithm, policy, reference, names, score=None, seed=0):
    condition = policy.encode(names)
    generators = sample_generators(seed, 1, len(names))
    return algorithm.loss(policy, condition, generators, score or scorer(), reference)


# -- Gaussian: DRaFT with a KL --------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("steps, kl", [(2, 0.0), (2, 0.3), (None, 0.3)])
def test_gradient_on_a_linear_chain(steps, kl, checkpoint):
    """Mean of step i: (P + Q w) x + Q b c; KL of two means: |difference|^2 / (2 std^2)."""
    policy, reference, names = LinearChain(1.0), other_chain(), prompts(4)
    algorithm = DRAKES(steps=steps, kl=kl, early=None, checkpoint=checkpoint)
    loss, _, scores = run(algorithm, policy, reference, names)
    loss.sum().backward()
    found = policy.gradient()

    w, b = (p.detach().clone().requires_grad_() for p in (policy.denoiser.w, policy.denoiser.b))
    w0, b0 = reference.denoiser.w.detach(), reference.denoiser.b.detach()
    c = policy.encode(names).tensors["centre"]
    x, *z = noise(4, T + 1)
    nats = 0
    for i in range(T):
        if i <= T - (steps or T):
            x = x.detach()
        mean = (policy.P[i] + policy.Q[i] * w[i]) * x + policy.Q[i] * b[i] * c
        mean0 = (policy.P[i] + policy.Q[i] * w0[i]) * x + policy.Q[i] * b0[i] * c
        if policy.std[i] > 0:
            nats = nats + ((mean - mean0) ** 2).sum(1) / (2 * policy.std[i] ** 2)
        x = mean + policy.std[i] * z[i]
    expected = kl * nats + ((x - c) ** 2).sum(1) / 2
    expected.sum().backward()
    torch.testing.assert_close(found, torch.stack([w.grad, b.grad]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    if kl:
        torch.testing.assert_close(scores.parts["kl"].double(), nats.detach(), rtol=1e-5, atol=1e-6)


# -- tokens ---------------------------------------------------------------------------------------


def letters(weights):
    """A linear reward of relaxed tokens, float64, that keeps what it saw."""

    def score(samples):
        score.seen.append(samples.data.detach())
        return Scores((samples.data * weights).sum((1, 2)))

    score.seen = []
    return score


WEIGHTS = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def exact_kl(policy, reference):
    """E sum_i KL(p || p_ref), over all states at every step."""
    total = 0.0
    for i in range(policy.num_steps):
        at = token_toys.state_law(policy, i)
        p, q = token_toys.transition(policy, i), token_toys.transition(reference, i)
        terms = torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0.0)
        total += (at @ terms.sum(1)).item()
    return total


@pytest.mark.parametrize("early", [None, 1, 2])
def test_kl_is_that_of_the_path_on_average(early):
    policy, reference = TokenChain(4, seed=1), TokenChain(4, seed=2)
    n, generator = 20_000, torch.Generator().manual_seed(0)
    *_, scores = DRAKES(steps=1, kl=1.0, early=early).loss(
        policy, policy.encode([""] * n), generator, letters(WEIGHTS), reference
    )
    nats = scores.parts["kl"].double()
    assert abs(nats.mean() - exact_kl(policy, reference)) < 4 * nats.std() / n**0.5
    assert nats.std() > 0


def test_the_authors_gate_leaves_nothing_of_hard_steps():
    policy, reference = TokenChain(4, seed=1), TokenChain(4, seed=2)
    names = [""] * 64
    score = letters(WEIGHTS)
    options = dict(steps=1, kl=1.0, early=None)
    *_, right = run(DRAKES(**options), policy, reference, names, score)
    *_, theirs = run(DRAKES(**options, official_kl=True), policy, reference, names, score)
    assert (theirs.parts["kl"] == 0).all()
    assert right.parts["kl"].mean() > 0.5
    *_, same = run(DRAKES(**options), policy, policy.reference(), names, score)
    assert (same.parts["kl"] == 0).all()


def test_the_authors_gate_on_relaxed_states():
    """One sample, position by position: half-unmasked counts, decided and masked ones do not."""
    policy, reference = TokenChain(4, seed=1), TokenChain(4, seed=2)
    x = torch.tensor([[[0.1, 0.2, 0.1, 0.6], [0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0]]]).double()
    condition = policy.encode([""])
    p, q = (each.denoiser(x)[0].softmax(-1).tolist() for each in (policy, reference))
    expected = 0.0
    for k, mass in enumerate([0.1, 0.2, 0.1]):
        a, b = p[0][k], q[0][k]
        expected += (1 - 0.6) * mass * (a * math.log(a / b) - a + b)
    expected /= 1 - 1 / 4
    laws = [each.step_law(x, 1, condition) for each in (policy, reference)]
    assert _official_kl(*laws, 1, 4).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("relaxation", ["mass", "official"])
def test_gradient_of_relaxed_steps_is_that_of_finite_differences(relaxation):
    policy = TokenChain(3, relaxation=relaxation, tau=0.7)
    reference = TokenChain(3, seed=2, relaxation=relaxation)
    algorithm = DRAKES(steps=None, kl=0.2, straight_through=False)
    table, names = policy.denoiser.table, [""] * 2

    def value():
        loss, *_ = run(algorithm, policy, reference, names, letters(WEIGHTS))
        return loss.double().sum()

    value().backward()
    gradient, rng = table.grad.clone(), torch.Generator().manual_seed(0)
    assert (gradient != 0).any(-1).any(-1).sum() > 20
    for _ in range(5):
        direction = torch.randn(table.shape, generator=rng, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                table.add_(sign * 1e-4 * direction)
            ends.append(value().item())
            with torch.no_grad():
                table.sub_(sign * 1e-4 * direction)
        slope = (ends[0] - ends[1]) / 2e-4
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-3, abs=1e-4)


def test_early_steps_have_the_gradient_of_their_kl():
    """steps=1: all states are hard. KL of step i is u_i sum over masked of KL(p || p_ref)."""
    policy, reference, names = TokenChain(4, seed=1), TokenChain(4, seed=2), [""] * 8
    algorithm = DRAKES(steps=1, kl=0.5, early=None)
    loss, *_ = run(algorithm, policy, reference, names, letters(0 * WEIGHTS))
    loss.sum().backward()
    found = policy.denoiser.table.grad.clone()

    policy.denoiser.table.grad = None
    path = rollout(
        policy, policy.encode(names), sample_generators(0, 1, 8), keep_path=True
    ).latents  # fmt: skip
    expected = 0.0
    for i in range(4):
        log_p, log_q = (e.denoiser(path[i]).log_softmax(-1) for e in (policy, reference))
        each = (log_p.exp() * (log_p - log_q.detach())).sum(-1)
        rate = 1 / (4 - i)  # (t - s) / t
        expected = expected + 0.5 * rate * (each * (path[i] == policy.mask)).sum()
    expected.backward()
    torch.testing.assert_close(found, policy.denoiser.table.grad, rtol=1e-5, atol=1e-7)


def test_drawn_early_steps_have_the_same_gradient_on_average():
    policy, reference = TokenChain(4, seed=1), TokenChain(4, seed=2)
    n, found = 4000, []
    for early in (None, 1):
        algorithm = DRAKES(steps=1, kl=1.0, early=early)
        generator = torch.Generator().manual_seed(0)
        condition = policy.encode([""] * n)
        loss, *_ = algorithm.loss(policy, condition, generator, letters(0 * WEIGHTS), reference)
        loss.mean().backward()
        found.append(policy.denoiser.table.grad[-1])  # of the state that is all MASK
        policy.denoiser.table.grad = None
    torch.testing.assert_close(found[1], found[0], rtol=0.2, atol=0.02)


def test_reward_reads_letters_and_its_gradient_is_of_the_relaxed_ones():
    policy, names = TokenChain(3, tau=0.8), [""] * 4
    grads = []
    for straight in (True, False):
        score = letters(WEIGHTS)
        loss, samples, _ = run(
            DRAKES(steps=2, kl=0.0, straight_through=straight), policy, None, names, score
        )
        loss.sum().backward()
        grads.append(policy.denoiser.table.grad.clone())
        policy.denoiser.table.grad = None
        onehot = ((score.seen[0] == 0) | (score.seen[0] == 1)).all()
        assert onehot == straight
        torch.testing.assert_close(samples.data.sum(-1), torch.ones(4, 3).double())
    torch.testing.assert_close(
        *grads
    )  # the reward is linear, so that where it is read is no matter


def test_pieces_do_not_change_the_result():
    policy, reference = TokenChain(5), TokenChain(5, seed=2)
    algorithm = DRAKES(steps=2, kl=0.3, early=1)
    generators = sample_generators(0, 1, 6)
    whole, *_ = algorithm.loss(
        policy, policy.encode([""] * 6), generators, letters(WEIGHTS), reference
    )
    generators, parts = sample_generators(0, 1, 6), []
    for some in (slice(0, 4), slice(4, 6)):
        condition = policy.encode([""] * len(generators[some]))
        parts.append(
            algorithm.loss(policy, condition, generators[some], letters(WEIGHTS), reference)[0]
        )
    torch.testing.assert_close(torch.cat(parts), whole)


def test_reward_rises_and_the_kl_holds_it():
    """Through the engine: without a KL the reward is maximised, with a large one it stays."""
    reached = {}
    for kl in (0.0, 20.0):
        policy = TokenChain(4, tau=0.5)
        target = torch.tensor([0, 1, 2])

        def match(samples, target=target):
            data = samples.data
            if not data.is_floating_point():
                return (data == target).float().mean(1)
            return data[:, torch.arange(3), target].mean(1).float()

        result = finetune(
            policy, as_reward(match), DRAKES(steps=4, kl=kl), [""],
            prompts_per_update=1, samples_per_prompt=64, iterations=40, learning_rate=0.1,
            method="full", loggers=[], evaluate_every=0, eval_samples=256, progress=False,
        )  # fmt: skip
        reached[kl] = result.after.scores["match"].mean() - result.before.scores["match"].mean()
        assert ("kl" in result.metrics[-1]) == (kl > 0)
    assert reached[0.0] > 0.4 and abs(reached[20.0]) < 0.15


# -- options --------------------------------------------------------------------------------------


def test_warmup():
    algorithm = DRAKES(kl=0.2, warmup=0.5)
    assert [algorithm.at(p).kl for p in (0.0, 0.25, 0.5, 1.0)] == [0, 0.1, 0.2, 0.2]
    assert algorithm.needs_reference and DRAKES(kl=0.2).at(0.0).kl == 0.2


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="steps must be 1 or more, or null"):
        DRAKES(steps=0)
    with pytest.raises(ValueError, match="kl must be 0 or more"):
        DRAKES(kl=-1.0)
    with pytest.raises(ValueError, match="early must be"):
        DRAKES(early=-1)
    with pytest.raises(ValueError, match="warmup is a share"):
        DRAKES(warmup=2.0)
    with pytest.raises(ValueError, match="steps=9 are to be differentiated, but the chain has 3"):
        run(DRAKES(steps=9), TokenChain(3), None, [""], letters(WEIGHTS))
    assert make_algorithm({"name": "drakes", "preset": "paper_dna"}).steps == 50
    with pytest.raises(ValueError, match="needs a gradient"):
        run(
            DRAKES(steps=1, kl=0.0), TokenChain(3), None, [""],
            lambda samples: Scores(torch.zeros(len(samples))),
        )  # fmt: skip
