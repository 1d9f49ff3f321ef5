"""``python -m entangle``: the command line."""

import sys

from entangle.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
