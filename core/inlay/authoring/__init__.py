"""What a method's author imports: the base, the faces, settings, and parts that several methods share."""

from inlay.adapter import Adapter, Init
from inlay.authoring.batches import calls, gradients, own_loss, rows
from inlay.authoring.bysite import by_site
from inlay.authoring.composite import Composite
from inlay.authoring.linear import LinearDelta
from inlay.authoring.rates import two_rates
from inlay.authoring.trained import OwnValues, Shift, Trained
from inlay.context import At, Call
from inlay.delta import (
    AttentionDelta,
    Change,
    Compact,
    Delta,
    Factored,
    InputDelta,
    KeyValues,
    OutputDelta,
    Ref,
    SequenceDelta,
    WeightDelta,
    Weights,
)
from inlay.errors import CannotMerge, ConfigError, RoutingError, TargetError
from inlay.hookspecs import hookimpl
from inlay.lifecycle import Step
from inlay.method import Method
from inlay.registry import registry
from inlay.settings import Strategy, setting
from inlay.sites import AttentionSite, BlockSite, ModuleSite, SequenceSite, Site, SublayerSite
from inlay.training import Group, Stage
from inlay.weights import read, wide

register = registry.register

__all__ = [
    "Adapter", "At", "AttentionDelta", "AttentionSite", "BlockSite", "Call", "CannotMerge", "Change",
    "Compact", "Composite", "ConfigError", "Delta", "Factored", "Group", "Init", "InputDelta", "KeyValues",
    "LinearDelta", "Method", "ModuleSite", "OutputDelta", "OwnValues", "Ref", "RoutingError",
    "SequenceDelta", "SequenceSite", "Shift", "Site", "Stage", "Step", "Strategy", "SublayerSite",
    "TargetError", "Trained", "WeightDelta", "Weights", "by_site", "calls", "gradients", "hookimpl",
    "own_loss", "read", "register", "rows", "setting", "two_rates", "wide",
]  # fmt: skip
