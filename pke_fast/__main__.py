"""`python -m pke_fast`: the command line."""

import sys

from pke_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
