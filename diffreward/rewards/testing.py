"""The conformance suite: run it on your own rewards, as this package does on its own."""

import dataclasses

import torch
from torch import Tensor

from diffreward.rewards.base import Reward, RewardInfo, Scores, evaluate
from diffreward.samples import Samples


def check_reward(
    reward: Reward, samples: Samples, *, atol: float = 1e-4, rtol: float = 1e-4
) -> None:
    """Check that a reward keeps its contract and what its info declares.

    One float32 ``(b,)`` value within the declared range; the same again when asked again, when
    the batch is split or reversed, and in inference mode; samples and torch's random state left
    untouched; a gradient where one is declared; clear errors for NaN data, the wrong modality
    and missing prompts.

    Args:
        reward: what to check.
        samples: two or more different samples it can score, with prompts if it needs them.
        atol, rtol: how closely scores must agree (round-off differs with the batch size).

    Raises:
        AssertionError: one sentence on the first thing that does not hold.
    """
    assert isinstance(reward, Reward) and isinstance(reward.info, RewardInfo), (
        f"{reward!r} has no info; make_reward(...) gives it one"
    )
    info, who = reward.info, f"reward {reward.info.name!r}"
    assert len(samples) >= 2, "check_reward needs two or more samples"

    def score(these: Samples) -> Scores:
        try:
            return evaluate(reward, these)
        except (TypeError, ValueError) as err:
            raise AssertionError(f"{who} cannot score valid samples: {err}") from err

    def assert_same(value: Tensor, expected: Tensor, when: str) -> None:
        same = torch.isclose(value, expected, atol=atol, rtol=rtol)
        if not same.all():
            i = int((~same).nonzero()[0, 0])
            raise AssertionError(
                f"{who} gives sample {i} {value[i].item():.6g} {when}, "
                f"but {expected[i].item():.6g} in the whole batch"
            )

    before = samples.data.clone() if isinstance(samples.data, Tensor) else list(samples.data)
    # First in inference mode: what a reward remembers from it must still serve gradients below.
    with torch.inference_mode():
        in_inference_mode = score(samples).value
    random_state = torch.get_rng_state()
    with torch.no_grad():
        value = score(samples).value
    assert torch.equal(torch.get_rng_state(), random_state), (
        f"{who} draws from torch's global random state"
    )
    untouched = (
        torch.equal(samples.data, before) if isinstance(before, Tensor) else samples.data == before
    )
    assert untouched, f"{who} changes the samples' data in place"
    low, high = info.range
    assert ((value >= low - atol) & (value <= high + atol)).all(), (
        f"{who} declares the range {info.range}, but gives {value.tolist()}"
    )
    assert_same(in_inference_mode.clone(), value, "in inference mode")

    indices = list(range(len(samples)))
    with torch.no_grad():
        assert_same(score(samples).value, value, "when asked again")
        alone = Scores.cat([score(samples.take([i])) for i in indices]).value
        assert_same(alone, value, "by itself")
        backwards = score(samples.take(indices[::-1])).value.flip(0)
        assert_same(backwards, value, "in a reversed batch")

    if isinstance(samples.data, Tensor) and samples.data.is_floating_point():
        data = samples.data.detach().clone().requires_grad_()
        with torch.enable_grad():
            graded = score(dataclasses.replace(samples, data=data)).value
        assert_same(graded.detach(), value, "with gradient")
        if info.differentiable:
            assert graded.requires_grad, (
                f"{who} is declared differentiable, but its value has no gradient"
            )
            (gradient,) = torch.autograd.grad(graded[torch.isfinite(graded)].sum(), data)
            assert torch.isfinite(gradient).all(), f"{who} has a gradient that is not finite"
            assert gradient.abs().sum() > 0, f"{who} has a gradient that is zero everywhere"
        _check_refused(reward, _with_nan(samples), "sample 1", "NaN data")

    if info.modality is not None:
        other = "text" if info.modality != "text" else "dna"
        _check_refused(
            reward,
            Samples(["a"] if other == "text" else torch.zeros(1, 4, dtype=torch.long), other),
            info.modality,
            f"{other} samples",
        )
    without = dataclasses.replace(samples, prompts=None)
    if info.needs_prompt:
        _check_refused(reward, without, "prompts", "samples without prompts")
    else:
        with torch.no_grad():
            assert_same(score(without).value, value, "without prompts")


def _with_nan(samples: Samples) -> Samples:
    data = samples.data.detach().clone()
    data[(1,) + (0,) * (data.ndim - 1)] = torch.nan
    return dataclasses.replace(samples, data=data)


def _check_refused(reward: Reward, samples: Samples, says: str, what: str) -> None:
    try:
        evaluate(reward, samples)
    except ValueError as err:
        assert says in str(err), (
            f"reward {reward.info.name!r} refuses {what} without saying {says!r}: {err}"
        )
    else:
        raise AssertionError(f"reward {reward.info.name!r} scores {what}, and must refuse them")
