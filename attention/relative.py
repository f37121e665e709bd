"""Biases of scores by how far a key stands from its query (T5, arXiv 1910.10683, section 2.1), as MPNet's encoder has them.

Near distances have a bias each, far ones share one on a log scale up to `REACH`; all that are farther have the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

REACH = 128  # tokens


def table(buckets: Sequence[Sequence[float]]) -> Tensor:
    """The bias of each distance j - i from -REACH to REACH, float32 (H, 2 REACH + 1), of each head's biases by bucket.

    The first half of the buckets are those of keys at and before the query, the second of those behind it.
    """
    far = torch.arange(-REACH, REACH + 1)
    half = len(buckets[0]) // 2
    near = half // 2
    steps = torch.log(far.abs().clamp(min=1).float() / near) / math.log(REACH / near) * (half - near)
    bucket = torch.where(far.abs() < near, far.abs(), (near + steps.long()).clamp(max=half - 1))
    return torch.tensor(buckets)[:, bucket + half * (far > 0)]


def bias(of: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Biases (H, ...) of query positions i and key positions j, which broadcast, by a `table`."""
    return of[:, (j - i).clamp_(-REACH, REACH).add_(REACH)]
