"""LoRA and DoRA for inlay."""
