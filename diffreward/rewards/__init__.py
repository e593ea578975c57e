"""Rewards: higher is better, one number per sample. The contract is in :mod:`.base`."""

from diffreward.rewards import (  # noqa: F401  (they enter their rewards in the registry)
    combine,
    image,
    image_reward,
    preference,
    probes,
    protein,
    remote,
    sequence,
    shapes,
    text,
    transforms,
    uncertainty,
    vlm,
)
from diffreward.rewards.base import (
    Reward,
    RewardInfo,
    RewardSpec,
    Scores,
    as_reward,
    available_rewards,
    evaluate,
    judge_prompts,
    make_reward,
    register_reward,
    require_gradient,
)

__all__ = [
    "Reward",
    "RewardInfo",
    "RewardSpec",
    "Scores",
    "as_reward",
    "available_rewards",
    "evaluate",
    "judge_prompts",
    "make_reward",
    "register_reward",
    "require_gradient",
]
