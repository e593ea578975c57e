"""Steering at inference time: the loop over a policy, and the hook into any pipeline."""

from diffreward.steering.feynman_kac import (
    POTENTIALS,
    BestOfN,
    FeynmanKac,
    SteeringResult,
    steer,
)
from diffreward.steering.hook import steered

__all__ = ["POTENTIALS", "BestOfN", "FeynmanKac", "SteeringResult", "steer", "steered"]
