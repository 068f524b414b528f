"""A callback for Lightning: checkpoints of the adapters alone, and proof that they learn."""

from inlay_lightning.callback import AdapterCallback

__all__ = ["AdapterCallback"]
