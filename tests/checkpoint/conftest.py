"""Makes `folders` and `make_hostile` importable by the tests of this folder; one thread per worker."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "hostile")]
torch.set_num_threads(1)
