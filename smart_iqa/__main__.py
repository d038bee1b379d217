"""`python -m smart_iqa` is the command `smart-iqa`."""
import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
