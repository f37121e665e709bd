"""The service: a transformer behind HTTP, on Ray Serve or alone. Importing it settles how OpenMP's threads wait."""

import os

__version__ = "0.1.0"

# OpenMP reads these when torch loads it. By default its threads spin for milliseconds where they wait for each other: beside
# four busy processes a prompt of 2,048 tokens then took over 40 s on two CPUs, 0.2 s like this, and alone as long as before.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
