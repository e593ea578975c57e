"""A masked policy over few short sequences, with a table for a network: it can be enumerated.

`TokenTable` has logits of its own for every one of the (v + 1)^l states; of relaxed states it takes
the multilinear mean, so that it is differentiable and exact at the vertices.
"""

import itertools

import torch
from torch import Tensor, nn

from diffreward.policies.masked import MaskedPolicy
from diffreward.policy import Condition


class TokenTable(nn.Module):
    def __init__(self, length: int = 3, vocabulary: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.length, self.states = length, vocabulary + 1
        g = torch.Generator().manual_seed(seed)
        shape = (self.states**length, length, vocabulary)
        self.table = nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            powers = self.states ** torch.arange(self.length - 1, -1, -1)
            return self.table[(x * powers).sum(1)]
        weights = x[:, 0]
        for at in range(1, self.length):
            weights = (weights[:, :, None] * x[:, at, None]).flatten(1)
        return torch.einsum("bs,slv->blv", weights, self.table)


class TokenChain(MaskedPolicy):
    """``drift`` times t is added to the logits of letter 0: then the network sees the time."""

    def __init__(self, num_steps=3, length=3, vocabulary=3, *, seed=0, drift=0.0, **options):
        super().__init__(
            TokenTable(length, vocabulary, seed), vocabulary, "toy", num_steps=num_steps, **options
        )
        self.length, self.drift = length, drift
        self.time_independent = drift == 0

    def encode(self, prompts, **inputs) -> Condition:
        rows = {k: t.expand(len(prompts), *t.shape[1:]) for k, t in inputs.items()}
        return Condition(list(prompts), rows)

    def latent_shape(self, condition):
        return (self.length,)

    def logits(self, x, t, condition):
        assert len(x) == len(condition) == len(t)
        first = torch.nn.functional.one_hot(torch.tensor(0), self.vocabulary)
        return self.denoiser(x) + self.drift * t[:, None, None] * first


def all_states(policy: TokenChain) -> Tensor:
    """``(S, l)``, in the order of the table."""
    return torch.tensor(list(itertools.product(range(policy.mask + 1), repeat=policy.length)))


def transition(policy: TokenChain, i: int, **inputs) -> Tensor:
    """``(S, S)``: probability of each state after step i, from each state."""
    states = all_states(policy)
    law = policy.step_law(states, i, policy.encode([""] * len(states), **inputs))
    n = len(states)
    pairs = law.take(torch.arange(n).repeat_interleave(n))
    return pairs.log_prob(states.repeat(n, 1)).exp().view(n, n)


def state_law(policy: TokenChain, steps: int | None = None, **inputs) -> Tensor:
    """``(S,)``: the law of x[steps], of x[T] by default."""
    start = policy.initial(policy.encode([""], **inputs))
    law = (all_states(policy) == start).all(1).double()
    for i in range(policy.num_steps if steps is None else steps):
        law = law @ transition(policy, i, **inputs)
    return law


def clean(policy: TokenChain) -> Tensor:
    """Which states have no MASK; those are the ``v^l`` sequences in order."""
    return (all_states(policy) < policy.mask).all(1)


def learn(policy: TokenChain, data: Tensor) -> None:
    """Give the network the exact conditionals of a law ``data`` ``(v^l,)`` of sequences."""
    states, sequences = all_states(policy), all_states(policy)[clean(policy)]
    agrees = ((states[:, None] == sequences) | (states[:, None] == policy.mask)).all(2)
    joint = agrees * data  # (state, sequence)
    letter = torch.nn.functional.one_hot(sequences, policy.vocabulary).double()
    p = torch.einsum("sn,nlv->slv", joint, letter) / joint.sum(1)[:, None, None]
    with torch.no_grad():
        policy.denoiser.table.copy_(p.clamp(min=1e-300).log())


def random_law(policy: TokenChain, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A law of sequences, with dependence between the positions."""
    g = torch.Generator().manual_seed(seed)
    number = policy.vocabulary**policy.length
    return (scale * torch.randn(number, generator=g, dtype=torch.float64)).softmax(0)


def index(policy: TokenChain, tokens: Tensor) -> Tensor:
    """Which of the ``v^l`` sequences each row is."""
    powers = policy.vocabulary ** torch.arange(policy.length - 1, -1, -1)
    return (tokens * powers).sum(1)
