"""`python -m emoe` is the command `emoe`."""

import sys

from emoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
