"""A journal of what inlay attaches, loads and merges."""

from inlay_journal.journal import Journal

__all__ = ["Journal"]
