"""The conformance suite: run it on your own rewards, as this package does on its own."""

import dataclasses
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffreward.rewards.base import Reward, RewardInfo, Scores, evaluate
from diffreward.samples import Samples


def check_reward(
    reward: Reward,
    samples: Samples,
    *,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    device_tol: float = 1e-2,
) -> None:
    """Check that a reward keeps its contract and what its info declares.

    One float32 ``(b,)`` value within the declared range; the same again, with its std and parts,
    when asked again, when the batch is split, rotated or reversed, and in inference mode; samples
    and global state (random generators, torch's modes and settings) left untouched; a gradient
    where one is declared; clear errors for NaN data, the wrong modality, missing prompts and
    missing context; where there is an accelerator, the same on it, and on the CPU again.

    Args:
        reward: what to check.
        samples: two or more different samples it can score, on the CPU, of its modality: images,
            tokens, relaxed tokens, text; with prompts and context if it needs them. A gradient
            is checked if their data are floating-point.
        atol, rtol: how closely scores must agree (round-off differs with the batch size).
        device_tol: the same for scores on the CPU and on an accelerator, absolute and relative.

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

    def assert_same(
        scores: Scores, when: str, order: list[int] | None = None, tol: float = 0.0
    ) -> None:
        """``scores`` are those of the whole batch, of which they may be a permutation."""
        truth = expected if order is None else expected.take(order)
        for what in _vectors(scores):
            assert what in _vectors(truth), f"{who} gives {what} {when}, but not otherwise"
        for what, number in _vectors(truth).items():
            assert what in _vectors(scores), f"{who} gives no {what} {when}"
            tensor = _vectors(scores)[what].detach().cpu()
            same = torch.isclose(
                tensor, number, atol=max(atol, tol), rtol=max(rtol, tol), equal_nan=what != "value"
            )
            if not same.all():
                i = int((~same).nonzero()[0, 0])
                sample = i if order is None else order[i]
                raise AssertionError(
                    f"{who} gives sample {sample} {'' if what == 'value' else what + ' '}"
                    f"{tensor[i].item():.6g} {when}, but {number[i].item():.6g} in the whole batch"
                )

    before, state = _copy(samples), _global_state()
    # First in inference mode: what a reward remembers from it must still serve gradients below.
    with torch.inference_mode():
        in_inference_mode = score(samples)
    _check_state(state, who)
    with torch.no_grad():
        expected = score(samples)
    _check_state(state, who)
    assert _equal(samples, before), f"{who} changes the samples in place"
    value = expected.value
    assert value.dtype == torch.float32 and value.shape == (len(samples),), (
        f"{who} gives {value.dtype} of shape {tuple(value.shape)}"
    )
    low, high = info.range
    assert ((value >= low - atol) & (value <= high + atol)).all(), (
        f"{who} declares the range {info.range}, but gives {value.tolist()}"
    )
    assert_same(_cloned(in_inference_mode), "in inference mode")

    indices = list(range(len(samples)))
    with torch.no_grad():
        states, own = [], random.getstate()
        try:
            for seed in (0, 1):
                random.seed(seed)
                assert_same(score(samples), "when asked again")
                states.append(random.getstate())
        finally:
            random.setstate(own)
        # (Type checkers at run time, as beartype, draw from it: that alone says nothing.)
        assert states[0] != states[1], f"{who} seeds python's global random state"
        assert_same(Scores.cat([score(samples.take([i])) for i in indices]), "by itself")
        for order, when in [
            (indices[::-1], "in a reversed batch"),
            (indices[1:] + indices[:1], "in a rotated batch"),
        ]:
            assert_same(score(samples.take(order)), when, order)

    if isinstance(samples.data, Tensor) and samples.data.is_floating_point():
        data = samples.data.detach().clone().requires_grad_()
        with torch.enable_grad():
            graded = score(dataclasses.replace(samples, data=data))
        assert_same(graded, "with gradient")
        if info.differentiable:
            value = graded.value
            assert value.requires_grad, (
                f"{who} is declared differentiable, but its value has no gradient"
            )
            (gradient,) = torch.autograd.grad(value[torch.isfinite(value)].sum(), data)
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
            assert_same(score(without), "without prompts")
    for key in info.needs_context:
        context = {name: extra for name, extra in samples.context.items() if name != key}
        incomplete = dataclasses.replace(samples, context=context)
        _check_refused(reward, incomplete, key, f"samples without {key} in their context")

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is not None and isinstance(samples.data, Tensor):
        with torch.no_grad():
            there = score(samples.to(device))
            assert there.value.device.type == device.type, f"{who} leaves the samples' device"
            assert_same(there, f"on {device.type}", tol=device_tol)
            assert_same(score(samples), f"on the CPU after {device.type}")
    _check_state(state, who)


def check_exact_agrees(reward: Reward, exact: Reward, samples: Samples, gap: float) -> float:
    """Check that a reward on tensors agrees with its twin that reproduces the original in PIL.

    Args:
        reward: reads tensors, differentiably.
        exact: the same with ``exact=True``: 8-bit PIL preprocessing, declared without gradient.
        samples: images; of several sizes, sides and contents over several calls.
        gap: how far their scores may differ, in units of the reward: what is published.

    Returns:
        The largest difference found.

    Raises:
        AssertionError: they differ by more than ``gap``, or ``exact`` does not declare that it has
            no gradient.
    """
    assert exact.info.differentiable is False, (
        f"reward {exact.info.name!r} rounds to 8 bits and must declare differentiable=False"
    )
    with torch.no_grad():
        values = [evaluate(one, samples).value for one in (reward, exact)]
    off = (values[0] - values[1]).abs()
    i = int(off.argmax())
    found = off[i].item()
    assert found <= gap, (
        f"reward {reward.info.name!r} gives sample {i} {values[0][i].item():.6g} from tensors, but "
        f"{values[1][i].item():.6g} through PIL: {found:.3g} apart, where {gap:g} is allowed"
    )
    return found


def _vectors(scores: Scores) -> dict[str, Tensor]:
    """Everything a reward says, by name."""
    std = {} if scores.std is None else {"std": scores.std}
    parts = {f"part {name!r}": part for name, part in scores.parts.items()}
    return {"value": scores.value, **std, **parts}


def _cloned(scores: Scores) -> Scores:
    """Outside of inference mode, for comparison."""
    return scores.take(range(len(scores)))


def _copy(samples: Samples) -> Samples:
    return samples.take(range(len(samples)))


def _equal(a: Samples, b: Samples) -> bool:
    def same(left: Any, right: Any) -> bool:
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return left.shape == right.shape and torch.equal(left, right)
        return type(left) is type(right) and left == right

    return (
        same(a.data, b.data)
        and a.prompts == b.prompts
        and a.context.keys() == b.context.keys()
        and all(same(a.context[key], b.context[key]) for key in a.context)
    )


def _global_state() -> dict[str, Any]:
    """What a reward may not change, by name."""
    state = {
        "torch's global random state": torch.get_rng_state().tolist(),
        "numpy's global random state": [str(part) for part in _numpy_state()],
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's inference mode": torch.is_inference_mode_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's autocast": torch.is_autocast_enabled("cpu"),
        "torch's float32 matmul precision": torch.get_float32_matmul_precision(),
    }
    for flag in ("enabled", "benchmark", "deterministic"):
        state[f"torch.backends.cudnn.{flag}"] = getattr(torch.backends.cudnn, flag)
    if torch.cuda.is_initialized():
        state["CUDA's global random state"] = torch.cuda.get_rng_state().tolist()
    return state


def _numpy_state() -> tuple:
    name, keys, *rest = np.random.get_state()
    return name, keys.tolist(), *rest


def _check_state(before: dict[str, Any], who: str) -> None:
    after = _global_state()
    for name, was in before.items():
        assert after[name] == was, f"{who} changes {name}"


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
