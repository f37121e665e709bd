"""python -m loadtests: see `run.py`."""

import signal
import sys

from loadtests.run import main

signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended as by Ctrl-C: a service of the run's own is stopped
sys.exit(main())
