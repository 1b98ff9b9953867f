"""`python -m whalejax`, the same as the command `whalejax`."""

import sys

from whalejax.cli import run


def main() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
