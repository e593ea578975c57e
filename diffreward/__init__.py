"""More reward out of diffusion models: finetune towards it, steer by it, score with it.

    import diffreward as dr

    policy = dr.load_policy("embedded:emoji")
    result = dr.steer(policy, "clip_score", ["a red heart above a blue circle"], num_particles=4)
    result.samples.data  # (1, 3, 64, 64), float32 RGB in [0, 1]
    dr.finetune(policy, "clip_score", "prdp", ["a red heart", "a star"], prompts_per_update=2)

The names below are the public API. They are imported when first used, so that importing the
package loads neither diffusers nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "Samples": "samples",
    "Condition": "policy",
    "Policy": "policy",
    "StepLaw": "policy",
    "Trajectory": "policy",
    "path_log_prob": "policy",
    "rollout": "policy",
    "sample_generators": "policy",
    "GuidedPolicy": "policies",
    "load_lora": "policies",
    "load_policy": "policies",
    "Reward": "rewards",
    "RewardInfo": "rewards",
    "Scores": "rewards",
    "available_rewards": "rewards",
    "evaluate": "rewards",
    "make_reward": "rewards",
    "register_reward": "rewards",
    "FeynmanKac": "steering",
    "SVDDResult": "steering",
    "SteeringResult": "steering",
    "steer": "steering",
    "steered": "steering",
    "svdd": "steering",
    "score": "scoring",
    "make_algorithm": "algorithms",
    "FinetuneResult": "finetuning",
    "Guard": "finetuning",
    "LoRA": "finetuning",
    "Training": "finetuning",
    "finetune": "finetuning",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from diffreward.algorithms import make_algorithm
    from diffreward.finetuning import FinetuneResult, Guard, LoRA, Training, finetune
    from diffreward.policies import GuidedPolicy, load_lora, load_policy
    from diffreward.policy import (
        Condition,
        Policy,
        StepLaw,
        Trajectory,
        path_log_prob,
        rollout,
        sample_generators,
    )
    from diffreward.rewards import (
        Reward,
        RewardInfo,
        Scores,
        available_rewards,
        evaluate,
        make_reward,
        register_reward,
    )
    from diffreward.samples import Samples
    from diffreward.scoring import score
    from diffreward.steering import (
        FeynmanKac,
        SteeringResult,
        SVDDResult,
        steer,
        steered,
        svdd,
    )


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffreward' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffreward.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
