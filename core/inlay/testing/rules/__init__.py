"""The rules, by subject. Importing this module declares them all, in the order of their numbers."""

from inlay.testing.rule import RULES
from inlay.testing.rules import attaching, files, manners, merging, sharing, training  # noqa: F401

__all__ = ["RULES"]
