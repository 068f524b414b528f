"""Each worker of the suite has one core: more threads of torch's own only make them wait for each other."""

import torch

torch.set_num_threads(1)
