"""Settings for all tests: no network; one thread, which is faster for tiny networks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
