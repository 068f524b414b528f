"""Anatomy: which module of a model plays which role. Only this and `sites/` look into foreign models."""

from inlay.anatomy.model import ROLES, Anatomy, anatomy, uses_attention_interface

__all__ = ["ROLES", "Anatomy", "anatomy", "uses_attention_interface"]
