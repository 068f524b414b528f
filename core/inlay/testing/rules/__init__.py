"""The rules, by subject. Importing this module declares them all; they are in the order of their numbers."""

from inlay.testing.rule import RULES
from inlay.testing.rules import attaching, bases, calls, files, format, manners, merging, sharing, training  # noqa: F401

for number in sorted(RULES):
    RULES[number] = RULES.pop(number)

__all__ = ["RULES"]
