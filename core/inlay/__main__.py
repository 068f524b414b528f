"""`python -m inlay`: the `inlay` command, whichever installed package brings it.

Launchers of several processes start modules, not scripts: `accelerate launch … -m inlay train …`.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from inlay.errors import RegistryError


def main() -> None:
    """Run the console script called `inlay`."""
    found = list(entry_points(group="console_scripts", name="inlay"))
    if not found:
        missing = RegistryError(
            "there is no `inlay` command here",
            saw="no installed package offers a console script of that name",
            do="pip install inlay-train",
        )
        sys.exit(str(missing))
    found[0].load()()


if __name__ == "__main__":
    sys.argv[0] = "inlay"
    main()
