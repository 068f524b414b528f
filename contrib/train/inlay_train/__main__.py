"""`python -m inlay_train` is the `inlay` command."""

from inlay_train.cli import app

if __name__ == "__main__":
    app(prog_name="inlay")
