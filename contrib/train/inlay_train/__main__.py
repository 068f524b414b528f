"""`python -m inlay_train`, and the `inlay` script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command. `inlay methods` is answered without typer, whose import takes longer than that."""
    if sys.argv[1:2] == ["methods"] and set(sys.argv[2:]) <= {"--json"}:
        from inlay_train.known import listing

        print(listing(as_json="--json" in sys.argv))
        return
    from inlay_train.cli import app

    app(prog_name="inlay")


if __name__ == "__main__":
    main()
