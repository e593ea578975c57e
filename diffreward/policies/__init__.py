"""Policies: diffusion models as Markov chains with a law per step."""

from diffreward.policies.gaussian import GaussianLaw, GaussianPolicy
from diffreward.policies.guided import GuidedPolicy
from diffreward.policies.loading import load_pipeline, load_policy
from diffreward.policies.lora import load_lora
from diffreward.policies.masked import MaskedLaw, MaskedPolicy
from diffreward.policies.pipelines import PipelinePolicy

__all__ = [
    "GaussianLaw",
    "GaussianPolicy",
    "GuidedPolicy",
    "MaskedLaw",
    "MaskedPolicy",
    "PipelinePolicy",
    "load_lora",
    "load_pipeline",
    "load_policy",
]
