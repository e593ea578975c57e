"""Settings for all tests: no network; one thread, which is faster for tiny networks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too

import torch

torch.set_num_threads(1)
