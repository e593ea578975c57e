"""Classifier-free guidance of masked policies against its formula, and against its two policies."""

import copy
import math

import pytest
import torch
from token_toys import TokenChain, all_states, clean, index, learn, random_law, state_law

from diffreward.finetuning import finetune
from diffreward.policies.guided import GuidedPolicy
from diffreward.policies.masked import first_hitting
from diffreward.policy import Policy, rollout, sample_generators

V, L = 3, 3
FIXED = torch.tensor([[-1, 2, -1]])
ALLOWED = torch.tensor([[[True, True, False], [True, True, True], [False, False, True]]])
INPUTS = [{}, {"fixed": FIXED}, {"allowed": ALLOWED}, {"fixed": FIXED, "allowed": ALLOWED}]
OPTIONS = [{}, {"temperature": 0.5}, {"schedule": "cosine", "remasking": 0.4}, {"drift": 1.0}]
SCALES = [-0.5, 0.0, 0.3, 1.0, 2.5]


def pair(scale, **options):
    policies = TokenChain(seed=0, **options), TokenChain(seed=1, **options)
    guided = GuidedPolicy(*policies, scale)
    guided.length = guided.conditional.length  # for token_toys
    return guided, *policies


def laws(policies, x, i=1, **inputs):
    return [p.step_law(x, i, p.encode([""] * len(x), **inputs)) for p in policies]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("inputs", INPUTS, ids="+".join)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_law_is_the_product_of_powers(options, inputs, scale):
    policies = pair(scale, **options)
    states = all_states(policies[0])
    with torch.no_grad():
        guided, ours, theirs = laws(policies, states, **inputs)
    masked = states == V
    p, q = ours.x0[masked], theirs.x0[masked]
    product = torch.where(p > 0, p**scale * q ** (1 - scale), 0.0)
    truth = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(guided.x0[masked], truth)
    assert torch.equal(guided.x0[~masked], ours.x0[~masked])
    # how much is unmasked does not depend on the letters
    torch.testing.assert_close(guided.probs[..., V], ours.probs[..., V])
    torch.testing.assert_close(guided.probs.sum(-1), torch.ones(len(states), L).double())


@pytest.mark.parametrize(("scale", "which"), [(1.0, 1), (0.0, 2)])
def test_scales_one_and_zero_are_either_policy(scale, which):
    policies = pair(scale, temperature=0.7, top_p=0.8)
    calls = [0, 0]
    for k, policy in enumerate(policies[1:]):
        logits = policy.logits

        def counted(*args, k=k, logits=logits):
            calls[k] += 1
            return logits(*args)

        policy.logits = counted
    final = [
        rollout(p, p.encode([""] * 20), sample_generators(0, 20, 1), keep_path=True, log_prob=True)
        for p in (policies[0], policies[which])
    ]
    for ours, theirs in zip(final[0].latents, final[1].latents, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(final[0].log_probs, final[1].log_probs)
    assert calls[which - 1] == 2 * policies[0].num_steps and calls[2 - which] == 0


def test_it_is_a_policy_and_its_samples_follow_the_law():
    guided = pair(1.7, num_steps=4)[0]
    assert isinstance(guided, Policy)
    with torch.no_grad():
        law = state_law(guided)[clean(guided)]
    n = 20000
    g = torch.Generator().manual_seed(0)
    found = index(guided, rollout(guided, guided.encode([""] * n), g).final)
    share = torch.bincount(found, minlength=len(law)) / n
    assert ((share - law).abs() < 4.5 * (law * (1 - law) / n).sqrt() + 1e-9).all()
    assert len(first_hitting(guided, guided.encode(["", ""])).final) == 2


def test_one_position_at_a_time_tilts_the_data_by_the_likelihood_ratio():
    """Independent letters: CFG of scale s samples p_u (p_c / p_u)^s exactly, however many steps."""
    guided, ours, theirs = pair(2.0, num_steps=3)
    tables = [
        torch.randn(L, V, generator=torch.Generator().manual_seed(k)).double() for k in (5, 6)
    ]
    for policy, table in zip((ours, theirs), tables, strict=True):
        policy.denoiser.table.data[:] = table
    with torch.no_grad():
        p, q = (state_law(policy)[clean(policy)] for policy in (ours, theirs))
        law = state_law(guided)[clean(guided)]
    truth = q * (p / q) ** 2
    torch.testing.assert_close(law, truth / truth.sum())


def test_likelihood_and_kl():
    """`elbo` and `kl` are of the guided law: bounds of one letter are its log-probability."""
    guided, ours, theirs = pair(2.0, length=1, num_steps=2)
    learn(ours, random_law(ours, 1))
    learn(theirs, random_law(theirs, 2))
    letters = torch.arange(V)[:, None]
    start = guided.initial(guided.encode([""] * V))
    with torch.no_grad():
        law, base = laws((guided, theirs), start, 0)
        expected = law.x0[0, 0].log()
        torch.testing.assert_close(guided.elbo(letters, guided.encode([""] * V)), expected)
        p, q = law.x0[:, 0], base.x0[:, 0]
        torch.testing.assert_close(law.kl(base), 0.5 * (p * (p / q).log()).sum(1))


# Excluded letters ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_letters_that_a_network_excludes(scale):
    """-inf of either policy that has a weight, of both, and none of it NaN, forward or backward."""
    policies = pair(scale)
    with torch.no_grad():
        policies[1].denoiser.table[..., 0] = -math.inf
        policies[2].denoiser.table[:, 0, :2] = -math.inf
    x = all_states(policies[0])
    x = x[(x == V).any(1)]
    guided, ours, theirs = laws(policies, x)
    masked = x == V
    p, q = ours.x0, theirs.x0
    excluded = ((p == 0) & (scale != 0)) | ((q == 0) & (scale != 1))
    assert (guided.x0[masked] > 0).equal(~excluded[masked])
    torch.testing.assert_close(guided.x0.sum(-1), torch.ones(len(x), L).double())
    at = torch.where(excluded.all(-1), V, (~excluded).int().argmax(-1))
    log_prob = guided.log_prob(torch.where(masked, at, x))
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    for policy, weight in zip(policies[1:], (scale, 1 - scale), strict=True):
        grad = policy.denoiser.table.grad
        assert (grad is None) == (weight == 0)
        assert grad is None or (grad.isfinite().all() and grad.any())


def test_nothing_left_is_an_error():
    guided, ours, theirs = pair(2.0)
    with torch.no_grad():
        ours.denoiser.table[..., :2] = -math.inf
        theirs.denoiser.table[..., 2:] = -math.inf
    with pytest.raises(ValueError, match="exclude all letters"):
        laws([guided], torch.full((1, L), V))


# What is trained ----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_reference_keeps_the_law_of_now(shared):
    ours = TokenChain(seed=0)
    theirs = ours if shared else TokenChain(seed=1)
    guided, x = GuidedPolicy(ours, theirs, 2.0), all_states(ours)
    assert guided.denoiser is ours.denoiser
    reference = guided.reference()
    before = laws([guided], x)[0].x0.detach()
    with torch.no_grad():
        ours.denoiser.table.mul_(2)
    assert not torch.allclose(laws([guided], x)[0].x0, before)
    torch.testing.assert_close(laws([reference], x)[0].x0, before)
    assert not reference.denoiser.table.requires_grad
    assert guided.conditional is ours and ours.denoiser is guided.denoiser  # not touched


def test_a_policy_guided_away_from_its_own_past():
    """Both share no network: training the one leaves the other, and scale 2 doubles the change."""
    ours = TokenChain(seed=0)
    past = ours.reference()
    x, change = all_states(ours), torch.randn(TokenChain().denoiser.table.shape).double()
    before = laws([ours], x)[0].hidden
    ours.denoiser.table.data += change
    guided = laws([GuidedPolicy(ours, past, 2.0)], x)[0]
    expected = (before[..., :V] + 2 * change).log_softmax(-1).exp()
    masked = x == V
    torch.testing.assert_close(guided.x0[masked], expected[masked])


def test_it_can_be_finetuned():
    guided, ours, theirs = pair(1.5)
    tables = [p.denoiser.table.detach().clone() for p in (ours, theirs)]

    def reward(samples):
        data = samples.data
        if not data.is_floating_point():
            data = torch.nn.functional.one_hot(data, V).double()
        return data[..., 0].sum(1)

    finetune(
        guided, reward, "ddpo", ["", "."], method="full", learning_rate=0.1, iterations=2,
        samples_per_prompt=4, eval_samples=4, evaluate_every=0, loggers=[], progress=False,
    )  # fmt: skip
    assert not torch.equal(ours.denoiser.table, tables[0])
    assert torch.equal(theirs.denoiser.table, tables[1])


# Conditions ---------------------------------------------------------------------------------


class Prompted(TokenChain):
    """Its prompt, a number, is added to the logits of letter 1; an empty one is 0."""

    def encode(self, prompts, *, strength=1.0, **inputs):
        condition = super().encode(prompts, **inputs)
        numbers = torch.tensor([strength * float(p or 0) for p in prompts])
        condition.tensors["number"] = numbers.double()
        return condition

    def logits(self, x, t, condition):
        extra = condition.tensors["number"][:, None, None] * torch.tensor([0.0, 1.0, 0.0])
        return super().logits(x, t, condition) + extra

    def decode(self, x0, condition):
        samples = super().decode(x0, condition)
        samples.context["number"] = condition.tensors["number"].tolist()
        return samples


def test_one_policy_that_reads_prompts():
    """logits + scale * number: what guidance of an additive condition is."""
    policy = Prompted()
    guided, plain = GuidedPolicy(policy, policy, 3.0), Prompted()
    x = torch.full((2, L), V)
    with torch.no_grad():
        law = guided.step_law(x, 0, guided.encode(["0.5", "-1"]))
        same = plain.step_law(x, 0, plain.encode(["1.5", "-3"]))
        torch.testing.assert_close(law.x0, same.x0)
        condition = guided.encode(["2"], strength=2.0, unconditional={"strength": 5.0}, fixed=FIXED)
    assert sorted(condition.tensors) == ["fixed", "number", "unconditional/number"]
    assert condition.prompts == ["2"] and float(condition.tensors["number"]) == 4.0
    again = condition.repeat(2).take([1])
    assert guided.initial(again).tolist() == [[V, 2, V]]
    assert guided.decode(torch.zeros(1, L).long(), again).context["number"] == [4.0]


def test_reused_logits_are_the_same():
    guided = pair(2.0, num_steps=6)[0]
    assert guided.time_independent and not pair(2.0, drift=1.0)[0].time_independent
    condition = guided.encode([""] * 8)
    with torch.no_grad():
        plain = rollout(guided, condition, sample_generators(0, 8, 1)).final
        with guided.reuse_logits():
            reused = rollout(guided, condition, sample_generators(0, 8, 1)).final
    assert torch.equal(plain, reused)


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_steps": 5}, "num_steps 3 .* 5"),
        ({"schedule": "cosine"}, "schedule 'loglinear' .* 'cosine'"),
        ({"vocabulary": 4}, "vocabulary 3 .* 4"),
        ({"temperature": 0.5}, r"temperature 1\.0 .* 0\.5"),
        ({"remasking": 0.5}, r"remasking 0\.0 .* 0\.5"),
    ],
)
def test_chains_that_differ(option, message):
    with pytest.raises(ValueError, match=message):
        GuidedPolicy(TokenChain(), TokenChain(**option), 2.0)


def test_other_bad_input():
    other = copy.copy(TokenChain())
    other.modality = "dna"
    with pytest.raises(ValueError, match="modality 'toy' .* 'dna'"):
        GuidedPolicy(TokenChain(), other, 2.0)
    with pytest.raises(TypeError):
        GuidedPolicy(TokenChain(), "embedded:emoji", 2.0)
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            GuidedPolicy(TokenChain(), TokenChain(), scale)
    with pytest.raises(ValueError, match="3 positions, .* 2"):
        GuidedPolicy(TokenChain(), TokenChain(length=2), 2.0).encode([""])
