"""`python -m lara_adapter.cli` is `lara`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
