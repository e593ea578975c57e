"""Finetuning: one engine for every algorithm of `diffreward.algorithms`.

`finetune` is the entry point; `options` has what can be set, and imports no torch.
"""

import importlib

_FROM = {
    "Engine": "engine",
    "FinetuneResult": "engine",
    "check_run": "checks",
    "finetune": "engine",
    "Training": "options",
    "LoRA": "options",
    "Guard": "options",
}

__all__ = ["Engine", "FinetuneResult", "Guard", "LoRA", "Training", "check_run", "finetune"]


def __getattr__(name: str):
    if name not in _FROM:
        raise AttributeError(f"module 'diffreward.finetuning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffreward.finetuning.{_FROM[name]}"), name)
