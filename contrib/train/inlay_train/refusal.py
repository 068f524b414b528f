"""Errors in three beats from code that imports inlay, and so torch, only when it has to complain."""

from __future__ import annotations


def refusal(what: str, *, saw: str, do: str) -> Exception:
    """Return an `InlayError`: what is wrong, what was seen, what to do."""
    from inlay.errors import InlayError

    return InlayError(what, saw=saw, do=do)
