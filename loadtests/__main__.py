"""python -m loadtests: see `run.py`."""

import sys

from loadtests.run import main

sys.exit(main())
