"""Who computes: one folder a kernel, in it one Protocol that the reading in torch and the one in C both answer.

    softmax/       attention by scores, under every exact backend
    features/      attention through a running sum, under every linear backend
    implementation.py    a backend's option `impl`, settled once
    library.py           the compiled functions: loading, layouts, what they may be told
    given.h  cpu.h  simd.h    what the C files share
    team.h  team.c       threads for calls of microseconds, which no other process holds up

A backend holds what `implementation` hands it and never asks which reading that is. No backend is known here.
"""

from __future__ import annotations

import math

LOG2_E = math.log2(math.e)  # all weights are powers of two: 2^(x log2 e) is e^x, and cheaper
