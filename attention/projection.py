"""The random rows of FAVOR+ (Choromanski et al., arXiv 2009.14794, section 2.4), for `performer` and who trains for it."""

from __future__ import annotations

import torch
from torch import Tensor


def projection(features: int, width: int, seed: int) -> Tensor:
    """The random rows W of FAVOR+: blocks of Haar-orthogonal rows with chi-distributed norms, float32 (m, D).

    Computed in float64 from `seed` alone, so every replica and every rerun has the same features. LAPACK's QR fixes the
    sign of its first reflection, which biases the rows; the columns are multiplied by sign(diag R) to make them Haar
    (Mezzadri, math-ph/0609050). Row norms are those of independent Gaussian rows.
    """
    generator = torch.Generator().manual_seed(seed)
    orthogonal = []
    for _ in range(-(-features // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        orthogonal.append((q * r.diagonal().sign()).T)
    norms = torch.randn(features, width, generator=generator, dtype=torch.float64).norm(dim=1)
    rows: Tensor = torch.cat(orthogonal)[:features] * norms[:, None]
    return rows.float()
