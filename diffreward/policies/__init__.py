"""Policies: diffusion models as Markov chains with a law per step."""

from diffreward.policies.gaussian import GaussianLaw, GaussianPolicy
from diffreward.policies.lora import load_lora
from diffreward.policies.pipelines import PipelinePolicy, load_policy

__all__ = ["GaussianLaw", "GaussianPolicy", "PipelinePolicy", "load_lora", "load_policy"]
