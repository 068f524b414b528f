"""Reparameterisations of weights beyond LoRA, for inlay."""
