"""Makes `faces` importable by the tests of this folder.

Each worker of the suite has one core: more threads of torch's own only make them wait for each other.
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent)]
torch.set_num_threads(1)
