"""DNA as a policy: templates, and that the chain is that of its network."""

import math

import pytest
import torch

from diffreward._assets import asset_path
from diffreward.networks.dna import DNAConvNet, SequenceCNN
from diffreward.policies import load_policy
from diffreward.policies.dna import DNAPolicy, load_dna
from diffreward.policy import Policy, path_log_prob, rollout, sample_generators
from diffreward.rewards import evaluate, make_reward
from diffreward.rewards.tokens import read_sequences
from diffreward.samples import Samples, to_strings, to_tokens

TINY = {"channels": 6, "kernel": 3, "dilations": (1, 3), "rounds": 1}


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return DNAPolicy(DNAConvNet(**TINY), length=12, num_steps=5)


def test_rollout_gives_sequences(policy):
    assert isinstance(policy, Policy) and policy.modality == "dna"
    condition = policy.encode(["", ""])
    generators = sample_generators(0, 1, 2)
    path = rollout(policy, condition, generators, keep_path=True, log_prob=True)
    assert (path.latents[0] == policy.mask).all()
    samples = policy.decode(path.final, condition)
    assert samples.modality == "dna" and samples.data.shape == (2, 12)
    assert all(set(s) <= set("ACGT") for s in to_strings(samples.data, "dna"))
    torch.testing.assert_close(path_log_prob(policy, path), path.log_probs)


def test_law_is_the_networks(policy):
    x = torch.tensor([[0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 0]])
    law = policy.step_law(x, 2, policy.encode([""]))
    p = policy.denoiser(x).softmax(-1)[0]
    torch.testing.assert_close(law.x0[0, 4:11], p[4:11])
    hot = torch.nn.functional.one_hot(x[0, :4], 4).float()
    torch.testing.assert_close(law.x0[0, :4], hot)


@pytest.mark.parametrize(("time", "seen"), [("none", False), ("constant", False), ("level", True)])
def test_noise_level_reaches_the_network_that_sees_it(time, seen):
    policy = DNAPolicy(DNAConvNet(**TINY, time=time), length=12, num_steps=4)
    x, condition = torch.full((1, 12), 4), policy.encode([""])
    first, later = (policy.step_law(x, i, condition).x0 for i in (0, 2))
    assert policy.time_independent is not seen
    assert torch.equal(first, later) is not seen


def test_template(policy):
    template = "TATAATNNNNWS"
    condition = policy.encode(["a"] * 40, template=template)
    drawn = to_strings(rollout(policy, condition, torch.Generator().manual_seed(0)).final, "dna")
    assert all(s[:6] == "TATAAT" and s[10] in "AT" and s[11] in "CG" for s in drawn)
    for at in range(6, 10):
        assert {s[at] for s in drawn} == set("ACGT")
    assert {s[10:] for s in drawn} == {"AC", "AG", "TC", "TG"}


def test_template_of_each_prompt(policy):
    condition = policy.encode(["", ""], template=["acgt" * 3, "N" * 12])
    assert condition.tensors["fixed"].tolist() == [[0, 1, 2, 3] * 3, [-1] * 12]
    assert "allowed" not in condition.tensors  # of N and single letters there is nothing to say


@pytest.mark.parametrize(
    ("code", "letters"), [("R", "AG"), ("Y", "CT"), ("K", "GT"), ("M", "AC"), ("B", "CGT"),
                          ("D", "AGT"), ("H", "ACT"), ("V", "ACG")]
)  # fmt: skip
def test_codes(policy, code, letters):
    allowed = policy.encode([""], template=code * 12).tensors["allowed"]
    assert (allowed == torch.tensor([letter in letters for letter in "ACGT"])).all()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("ACGT", "template 0 has 4 bases, but the policy's sequences 12; fill it up with N"),
        (["N" * 12, "NNNNNXNNNNNN"], "template 1 has 'X' at position 5; expected one of ACGTRY"),
        (["N" * 12], "1 templates came for 2 prompts"),
    ],
)
def test_bad_template(policy, template, message):
    with pytest.raises(ValueError, match=message):
        policy.encode(["", ""], template=template)


def test_load(tmp_path):
    network = DNAConvNet(**TINY)
    network.save_pretrained(tmp_path / "policy")
    policy = load_dna(tmp_path / "policy", num_steps=7, length=30, schedule="cosine", device="cpu")
    assert (policy.num_steps, policy.schedule, policy.length) == (7, "cosine", 30)
    x = torch.full((1, 30), 4)
    got = policy.logits(x, torch.ones(1), policy.encode([""]))
    torch.testing.assert_close(got, network(x), rtol=0, atol=0)
    half = load_dna(tmp_path / "policy", length=30, dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16
    assert half.step_law(x, 0, half.encode([""])).x0.dtype == torch.float32


def test_load_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no config.json in"):
        load_dna(tmp_path)
    SequenceCNN(["x"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of a SequenceCNN, not of a DNAConvNet"):
        load_dna(tmp_path)
    with pytest.raises(ValueError, match="length must be 1 or more, but 0 came"):
        DNAPolicy(DNAConvNet(**TINY), length=0)


def test_embedded_model_and_oracles():
    """Natural sequences are likelier than their letters shuffled, and oracles like them."""
    natural = read_sequences(asset_path("dna/natural_upstream.fasta"), "dna")[::40][:16]
    x = torch.stack([to_tokens(letters, "dna") for letters in natural])
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in x])
    policy = load_policy("embedded:dna", num_steps=8, device="cpu")
    condition = policy.encode([""] * len(x))
    with torch.no_grad():
        bits = [
            -policy.elbo(t, condition, generator, 8).mean().item() / x.shape[1] / math.log(2)
            for t in (x, shuffled)
        ]
        scores = {
            name: [evaluate(make_reward(name), Samples(t, "dna")).value for t in (x, shuffled)]
            for name in ("sequence_oracle", "sequence_judge")
        }
    assert bits[0] < bits[1] and bits[0] < 2
    for ours, theirs in scores.values():
        assert ours.median() > 0 and ours.mean() > theirs.mean()
