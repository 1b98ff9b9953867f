"""`python -m whalejax.bench.schedules`."""

import os
import sys

from whalejax.bench.schedules import main

if __name__ == "__main__":
    unfinished = main()
    sys.stdout.flush()
    if unfinished:  # the compiler's threads would be torn down under it
        os._exit(0)
