"""The former name of `steertune.recipes.studies.benchmark`."""

import sys

from steertune.recipes.studies.benchmark import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
