"""Ranks are forked: the process that forks them must not have started a second thread."""

import torch

torch.set_num_threads(1)
