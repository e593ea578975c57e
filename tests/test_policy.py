"""Conditions, generators, and the one sampling loop."""

import pytest
import torch
from toys import ARChain

from diffreward import Condition, Policy, StepLaw, path_log_prob, rollout, sample_generators
from diffreward.policy import randn


def test_condition_selects_and_repeats():
    c = Condition(["a", "b"], {"x": torch.tensor([[1.0], [2.0]])})
    assert len(c) == 2 and c.take([1]).prompts == ["b"]
    r = c.repeat(3)
    assert (
        r.prompts == ["a"] * 3 + ["b"] * 3
        and r.tensors["x"][:, 0].tolist() == [1.0] * 3 + [2.0] * 3
    )
    with pytest.raises(ValueError, match="'x' has 1 rows for 2 prompts"):
        Condition(["a", "b"], {"x": torch.zeros(1, 1)})


def test_rollout_log_probs_are_path_log_probs():
    policy = ARChain(num_steps=5)
    condition = policy.encode(["0", "1", "2"])
    t = rollout(policy, condition, torch.Generator().manual_seed(0), keep_path=True, log_prob=True)
    assert len(t.latents) == 6 and t.log_probs.shape == (3, 5)
    torch.testing.assert_close(path_log_prob(policy, t), t.log_probs)
    assert torch.equal(t.final, t.latents[-1])
    # by hand: x' ~ N(c + sqrt(a) (x - c), 1 - a)
    c, a = condition.tensors["centre"], policy.a
    for i in range(5):
        law = torch.distributions.Normal(c + a**0.5 * (t.latents[i] - c), (1 - a) ** 0.5)
        torch.testing.assert_close(law.log_prob(t.latents[i + 1])[:, 0], t.log_probs[:, i])


def test_the_chain_samples_its_law():
    policy = ARChain(num_steps=3)
    x = rollout(policy, policy.encode(["2"]).repeat(20_000), torch.Generator().manual_seed(0)).final
    assert abs(x.mean() - 2) < 5 / 20_000**0.5 and abs(x.var() - 1) < 0.05


def test_without_the_path_only_the_end_is_kept():
    policy = ARChain(num_steps=3)
    t = rollout(policy, policy.encode(["0"]))
    assert len(t.latents) == 1 and t.log_probs is None
    with pytest.raises(ValueError, match="keep_path=True"):
        path_log_prob(policy, t)


def test_a_given_start_is_used_and_gradients_are_the_callers_choice():
    policy = ARChain(num_steps=3)
    condition = policy.encode(["0"])
    x = torch.full((1, 1), 10.0, dtype=torch.float64, requires_grad=True)
    end = rollout(policy, condition, x=x, differentiable=True).final
    (gradient,) = torch.autograd.grad(end.sum(), x)
    torch.testing.assert_close(gradient.item(), policy.a**1.5)
    assert not rollout(policy, condition, x=x).final.requires_grad
    with torch.no_grad():
        assert not rollout(policy, condition, x=x, differentiable=True).final.requires_grad


def test_progress_wraps_the_steps():
    seen = []

    def progress(steps):
        for i in steps:
            seen.append(i)
            yield i

    policy = ARChain(num_steps=4)
    rollout(policy, policy.encode(["0"]), progress=progress)
    assert seen == [0, 1, 2, 3]


def draws(generators):
    return [torch.randn(3, generator=g).tolist() for g in generators]


def test_seeds_depend_on_prompt_and_sample_alone():
    everything = draws(sample_generators(0, 3, 4))
    assert len({tuple(d) for d in everything}) == 12
    assert draws(sample_generators(0, 1, 4, first_prompt=2)) == everything[8:]
    fewer = draws(sample_generators(0, 3, 2))
    assert fewer == [everything[p * 4 + s] for p in range(3) for s in range(2)]
    assert draws(sample_generators(0, 3, 4)) == everything
    for other in (sample_generators(1, 3, 4), sample_generators(0, 3, 4, stream=1)):
        assert not {tuple(d) for d in draws(other)} & {tuple(d) for d in everything}


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="seed must be 0 or more, but -1 came"):
        sample_generators(-1, 1, 1)


def test_randn_rows_come_from_their_own_generators():
    together = randn((3, 2), sample_generators(0, 3, 1))
    alone = randn((1, 2), sample_generators(0, 3, 1)[2:])
    assert torch.equal(together[2:], alone)
    one = randn((3, 2), torch.Generator().manual_seed(5))
    assert torch.equal(one, torch.randn(3, 2, generator=torch.Generator().manual_seed(5)))
    assert randn((2, 2), dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="2 generators came for a batch of 3"):
        randn((3, 2), sample_generators(0, 2, 1))


def test_the_toys_are_policies():
    policy = ARChain()
    assert isinstance(policy, Policy) and not isinstance(object(), Policy)
    assert isinstance(policy.step_law(torch.zeros(1, 1).double(), 0, policy.encode(["0"])), StepLaw)
