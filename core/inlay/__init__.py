"""inlay adapts a large model by training a very small part of it.

Methods (LoRA, adapters, prefixes, …) come as packages of their own and stack on one model:

    inlay.attach(model, LoRA(rank=8) + PrefixTuning(length=16), train=("head",))
"""

from inlay.anatomy import anatomy
from inlay.attach import attach, detach, set_trainable
from inlay.checkpoint import load, save
from inlay.combine import combine
from inlay.errors import CannotMerge, InlayError
from inlay.lifecycle import lifecycle
from inlay.lowrank import to_lora
from inlay.merge import merge, unmerge
from inlay.plan import plan
from inlay.registry import registry
from inlay.routing import route, use
from inlay.summary import summary
from inlay.training import advance, auxiliary_loss, check_training, parameter_groups, stages

methods = registry.methods
observe = registry.observing

__all__ = [
    "CannotMerge", "InlayError", "advance", "anatomy", "attach", "auxiliary_loss", "check_training",
    "combine", "detach", "lifecycle", "load", "merge", "methods", "observe", "parameter_groups", "plan",
    "route", "save", "set_trainable", "stages", "summary", "to_lora", "unmerge", "use",
]  # fmt: skip
