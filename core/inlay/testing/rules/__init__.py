"""The rules, by subject. Importing this module declares them all, in the order of their numbers."""

from inlay.testing.rule import RULES
from inlay.testing.rules import attaching, training, merging, files, sharing, manners  # noqa: F401, I001

__all__ = ["RULES"]
