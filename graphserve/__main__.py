"""``python -m graphserve``: the command line."""

import sys

from graphserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
