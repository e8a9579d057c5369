"""`python -m regrad_cli` is `regrad`."""

import sys

from regrad_cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
