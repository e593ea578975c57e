"""Settings for all tests: no network; one thread, which is faster for tiny networks."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
# for `scripts`; last, so that the package which is tested is the installed one
sys.path.append(str(Path(__file__).parent.parent))

import torch

torch.set_num_threads(1)
