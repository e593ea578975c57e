"""What a run refuses: options and data before any compute, wrong numbers at its first update."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffreward.algorithms import Algorithm
from diffreward.controlled import ControlledImages
from diffreward.finetuning.batches import Batches
from diffreward.finetuning.checkpoint import find_checkpoint
from diffreward.finetuning.options import Training
from diffreward.finetuning.record import check_hub, check_loggers
from diffreward.finetuning.sharding import local
from diffreward.finetuning.team import Team
from diffreward.preferences import Preferences
from diffreward.rewards import Reward, Scores, evaluate
from diffreward.samples import Samples


def with_options(training: Training, options: Mapping[str, Any]) -> Training:
    """The training with some options replaced.

    Raises:
        ValueError: there is no such option; the nearest is named.
    """
    known = [option.name for option in fields(Training)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}"
            raise ValueError(f"there is no option {name!r} of finetune; {hint}")
    return replace(training, **options)


def check_options(training: Training) -> None:
    """Refuse options out of range.

    Raises:
        ValueError: naming one.
    """
    least = dict.fromkeys(("iterations", "eval_samples", "keep_checkpoints"), 1)
    least |= dict.fromkeys(("warmup", "checkpoint_every", "evaluate_every", "seed"), 0)
    if training.decode_batch is not None:
        least["decode_batch"] = 1
    for name, low in least.items():
        if getattr(training, name) < low:
            raise ValueError(f"{name} must be at least {low}, but {getattr(training, name)} came")
    for name in ("learning_rate", "max_grad_norm"):
        if not getattr(training, name) > 0:
            raise ValueError(f"{name} must be positive, but {getattr(training, name)} came")
    if training.ema_decay is not None and not 0 <= training.ema_decay < 1:
        raise ValueError(f"ema_decay lies in [0, 1), but {training.ema_decay} came")
    if not 0 < training.step_fraction <= 1:
        raise ValueError(f"step_fraction lies in (0, 1], but {training.step_fraction} came")


def check_run(
    algorithm: Algorithm,
    training: Training,
    num_prompts: int,
    processes: int = 1,
    *,
    output: str | Path | None = None,
    resume: str | Path | int | None = None,
    hub: str | None = None,
    preferences: Preferences | None = None,
    data: ControlledImages | None = None,
) -> tuple[Batches, Path | None]:
    """Refuse what can be refused without the model.

    Returns:
        How samples are divided, and the checkpoint to go on from.

    Raises:
        ValueError: bad options; a logger that is missing; a hub that cannot be reached;
            preferences that the algorithm cannot learn from; no pictures for one that needs them.
        FileNotFoundError: no such checkpoint.
        FileExistsError: the output holds another run.
    """
    check_options(training)
    if preferences is not None:
        check_preferences(preferences, algorithm)
        if data is not None:
            raise ValueError("a run learns from preferences or from data; give one of the two")
    check_data(data, algorithm)
    batches = Batches(
        training.prompts_per_update, training.samples_per_prompt, algorithm.minibatches,
        processes, training.max_batch, num_prompts,
    )  # fmt: skip
    if resume is not None and output is None:
        raise ValueError("resume needs output, the folder of the run to go on with")
    start = None if resume is None else find_checkpoint(output, resume)
    if output is not None and start is None and (Path(output) / "metrics.jsonl").exists():
        raise FileExistsError(
            f"{output} holds a run already; give resume='latest' to go on with it, or choose "
            "another output"
        )
    check_loggers(training.loggers)
    if hub is not None:
        check_hub(hub)
    return batches, start


def check_preferences(preferences: Preferences, algorithm: Algorithm) -> None:
    """Refuse a data set that the algorithm cannot learn from.

    Raises:
        ValueError: it takes none, or only pairs.
    """
    takes = getattr(algorithm, "preferences", None)
    if takes is None:
        raise ValueError(
            f"{type(algorithm).__name__} learns from own samples, and not from a data set of "
            "preferences; use dpo or kto"
        )
    if takes == "pairs" and not preferences.paired:
        raise ValueError(
            f"{type(algorithm).__name__} compares two samples of a prompt, and {preferences.path} "
            "has single ones with labels; use kto"
        )


def check_data(data: ControlledImages | None, algorithm: Algorithm, policy: Any = None) -> None:
    """Refuse an algorithm without the pictures it learns from, or a policy that cannot encode them.

    Raises:
        ValueError: saying what is missing.
    """
    if not getattr(algorithm, "needs_data", False):
        return
    name = type(algorithm).__name__
    if data is None:
        raise ValueError(f"{name} learns from pictures; give data (a manifest, or embedded:scenes)")
    for method in ("encode_samples", "denoise") if policy is not None else ():
        if not hasattr(policy, method):
            raise ValueError(
                f"{name} predicts noised pictures, and {type(policy).__name__} has no {method}"
            )


def check_image_gradient(reward: Reward, samples: Samples) -> None:
    """The reward of pictures has a gradient with respect to them, which is not 0 everywhere.

    Args:
        reward: to be climbed by its gradient.
        samples: a few pictures; a little noise is added, since a picture that keeps its condition
            exactly may be the maximum.

    Raises:
        ValueError: it has none, as after a cast to whole numbers or under no_grad, or it is 0.
    """
    noise = torch.randn(samples.data.shape, generator=torch.Generator().manual_seed(0))
    data = (samples.data.detach() + 0.1 * noise.to(samples.data.device)).clamp(0, 1)
    data.requires_grad_()
    with torch.enable_grad():
        value = evaluate(reward, replace(samples, data=data)).value
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), data, allow_unused=True)
    name = reward.info.name
    if gradient is None:
        raise ValueError(
            f"the reward {name!r} has no gradient with respect to the picture: somewhere it is cut "
            "(a cast to whole numbers, detach, no_grad, a threshold), so that there is nothing to "
            "climb; use a differentiable reward, or prdp, ddpo or another algorithm without one"
        )
    if not gradient.any() or not gradient.isfinite().all():
        what = "0 everywhere" if not gradient.any() else "NaN or infinite"
        raise ValueError(
            f"the gradient of the reward {name!r} with respect to {len(data)} pictures is {what}: "
            "is it piecewise constant, or saturated there?"
        )


def check_rewards(scores: Scores, first: bool) -> None:
    """Rewards of a rollout are finite; of the first one, not all the same.

    Raises:
        ValueError: one is infinite.
    """
    value = scores.value
    if not torch.isfinite(value).all():
        raise ValueError(
            f"{int((~torch.isfinite(value)).sum())} of {len(value)} samples have the reward "
            f"{value[~torch.isfinite(value)][0].item()}; finetuning needs finite rewards "
            "(clip_range bounds one)"
        )
    if first and len(value) > 1 and bool((value == value[0]).all()):
        warnings.warn(
            f"all {len(value)} samples of the first rollout have the reward "
            f"{value[0].item():.4g}: there is nothing to learn from yet",
            stacklevel=2,
        )


def check_ratio(recomputed: Tensor, old: Tensor, half: bool) -> float:
    """On the policy that drew the samples, recomputed log-probabilities are the same.

    Returns:
        The largest difference, in nats.

    Raises:
        RuntimeError: it is above the bound, which is wider in half precision.
    """
    gap = (recomputed - old).abs().nan_to_num(0).max().item()
    bound = 1.0 if half else 0.05
    if gap > bound:
        raise RuntimeError(
            f"self-check: log-probabilities of the same steps differ by {gap:.3g} nats between "
            f"rollout and training, and the bound is {bound} for this precision. The network "
            "is not deterministic: does it have dropout, or other inputs in training?"
        )
    return gap


def check_gradients(network: nn.Module, parameters: Sequence[Tensor], team: Team) -> None:
    """Gradients are where they should be, and nowhere else.

    Raises:
        RuntimeError: something has one that is not trained.
    """
    trained = {id(p) for p in parameters}
    others = [
        name
        for name, p in network.named_parameters()
        if p.grad is not None and id(p) not in trained
    ]
    if others:
        raise RuntimeError(
            f"self-check: {len(others)} parameters that are not trained have gradients, such "
            f"as {others[0]!r}; set requires_grad to False for them"
        )
    reached = any(p.grad is not None and bool(local(p.grad).any()) for p in parameters)
    if not team.any(reached):
        warnings.warn(
            "the first update has no gradient: are all rewards of each prompt equal?",
            stacklevel=2,
        )
