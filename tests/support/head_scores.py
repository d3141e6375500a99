"""Head scores that tests of several methods share."""

import torch

# Few heads with most of the mass, one without any; two query heads a KV head.
SCORES = torch.tensor([[0.0, 0.0, 1.0, 4.0], [90.0, 0.5, 0.25, 1.0], [2.0, 2.0, 7.0, 0.125]])
