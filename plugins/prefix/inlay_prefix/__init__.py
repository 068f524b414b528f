"""Prefix tuning and P-tuning v2 for inlay."""
