"""Print the path of a configuration for `accelerate launch --config_file`; without a name, all names."""

import sys

from steertune.recipes.accelerate_configs import names, path

if __name__ == "__main__":
    try:
        print("\n".join(map(str, map(path, sys.argv[1:]))) if sys.argv[1:] else "\n".join(names()))
    except ValueError as error:
        sys.exit(str(error))
