"""One thread for every test: tiny models gain nothing from two, and a sum split among threads rounds otherwise in another process."""

import torch

torch.set_num_threads(1)
