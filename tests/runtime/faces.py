"""One method for every way of acting, for tests that must hold for all: (family, stack) by name."""

from __future__ import annotations

FACES = {
    "low rank": ("llama", "lora(rank=4)"),
    "embedding": ("llama", "lora(rank=4, targets=['embedding'])"),
    "kept start": ("llama", "lora(rank=4, start=pissa())"),
    "level": ("llama", "dora(rank=4)"),
    "sublayer": ("llama", "serial_adapter(rank=8)"),
    "residual": ("llama", "serial_adapter(rank=8, placement='pfeiffer')"),
    "attention": ("llama", "prefix_tuning(length=3, hidden=16)"),
    "sequence": ("llama", "prompt_tuning(length=4)"),
    "scale": ("llama", "ia3()"),
    "shift": ("llama", "ssf()"),
    "bias": ("qwen", "bitfit()"),
    "norm": ("llama", "ln_tuning()"),
    "input": ("llama", "oft(block_size=8)"),
    "encoder": ("bert", "lora(rank=4) + prompt_tuning(length=4) + serial_adapter(rank=8) + bitfit()"),
}
