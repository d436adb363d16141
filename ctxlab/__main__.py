"""`python -m ctxlab` is the command `ctxlab`."""

import sys

from ctxlab.cli import main

if __name__ == "__main__":  # processes that a run starts import this file, too
    sys.exit(main())
