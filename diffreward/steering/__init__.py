"""Steering at inference time: the loop over a policy, and the hook into any pipeline."""

from diffreward.steering.feynman_kac import POTENTIALS, FeynmanKac, steer
from diffreward.steering.hook import steered
from diffreward.steering.result import BestOfN, SteeringResult, SVDDResult
from diffreward.steering.svdd import svdd

__all__ = [
    "POTENTIALS",
    "BestOfN",
    "FeynmanKac",
    "SVDDResult",
    "SteeringResult",
    "steer",
    "steered",
    "svdd",
]
