"""`Converter`: how one method is written in a peft checkpoint, as data where that will do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from inlay.delta import Delta
from inlay.sites import Slice
from inlay.weights import read
from inlay_peft_bridge.report import refused

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """One site of an adapter on its way: where it is, its deltas, and its method's settings.

    `path` is the module's, also of a site that is a slice of it.
    """

    site: Any
    path: str
    deltas: Sequence[Delta]
    settings: Config

    @property
    def weight(self) -> Tensor:
        """The base's weight here (out, in); refused if only its shape is known."""
        if any(t.is_meta for t in self.site.module.parameters(recurse=False)):
            raise refused(
                "this conversion needs the values of the base's weights",
                saw=f"only the shape of {self.path} is known",
                do="name a base folder that holds its weights",
            )
        weight: Tensor = read(self.site)[0]
        return weight


def same_tensors(tensors: Tensors, place: Place) -> Tensors:
    return tensors


def no_settings(given: Config) -> dict[str, Any]:
    return {}


def no_own_config(place: Place) -> dict[str, Any]:
    return {}


Join = Callable[[Sequence[tuple[Slice, Tensors, Config]], int], tuple[Tensors, dict[str, Any]]]


@dataclass(frozen=True)
class Converter:
    """One method here and in peft.

    `tensors` maps the end of a tensor's name in peft to the end of its name here ("#1.x" is of the
    second delta at a site); `settings` maps keys of peft's configuration to settings that mean the
    same. The rest only where it is needed:

    - `read_config` gives the other settings from all of peft's configuration, of which it understands
      the keys `reads`; `write_config` gives the other keys from all the settings. `starts` are keys that
      only say where training started. `when` tells configurations of one `peft_type` apart.
    - `read` makes one site's tensors, under the names here, of peft's values; `write` makes peft's, in
      peft's shapes. In reading, shapes may differ by dimensions of size one.
    - `patterns` maps peft's keys of settings by layer to the key that each overrides; `lists` are keys that
      list modules; `own_config` gives a site's own values of either, for a list true or false.
    - `join` makes of the slices of one fused layer, each with tensors in peft's values and its
      configuration, the tensors of the whole layer and its configuration. Without it slices are refused.
    - `shared` maps peft's names of tensors that all layers share to their names among the adapter's shared
      parts, `write_shared` makes peft's shapes of them, `repeats` says that peft saves them at each layer
      too; `buffers` are tensors at a site that do not learn and are saved.
    - `needs_weights` says that `read` and `write` ask for the base's weights.
    """

    peft_type: str
    method: str
    tensors: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)
    read_config: Callable[[Config], dict[str, Any]] = no_settings
    write_config: Callable[[Config], dict[str, Any]] = no_settings
    reads: frozenset[str] = frozenset()
    starts: frozenset[str] = frozenset()
    when: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Tensors, Place], Tensors] = same_tensors
    write: Callable[[Tensors, Place], Tensors] = same_tensors
    patterns: Mapping[str, str] = field(default_factory=dict)
    lists: frozenset[str] = frozenset()
    own_config: Callable[[Place], dict[str, Any]] = no_own_config
    join: Join | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    write_shared: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    repeats: bool = False
    buffers: frozenset[str] = frozenset()
    needs_weights: bool = False

    def applies(self, config: Config) -> bool:
        """Whether a configuration of peft's is for this converter."""
        return config.get("peft_type") == self.peft_type and all(
            bool(config.get(key)) == bool(value) for key, value in self.when.items()
        )

    def settings_of(self, config: Config) -> dict[str, Any]:
        """Return the settings here that a configuration of peft's means."""
        plain = {here: config[there] for there, here in self.settings.items() if there in config}
        return {**plain, **self.read_config(config)}

    def config_of(self, settings: Config) -> dict[str, Any]:
        """Return the configuration of peft's that settings here mean."""
        plain = {there: settings[here] for there, here in self.settings.items()}
        return {**self.when, **plain, **self.write_config(settings)}

    def understood(self) -> frozenset[str]:
        """Return the keys of peft's configuration that are carried over, or need not be."""
        return frozenset({*self.settings, *self.reads, *self.starts, *self.when, *self.patterns, *self.lists})


def fitted(tensor: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """Return `tensor` in `shape`, which may differ from its own by dimensions of size one."""
    if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
        raise refused(
            "a tensor does not have the shape that the adapter needs",
            saw=f"{where}: {tuple(tensor.shape)}, needed {tuple(shape)}",
            do="name the base model that it was trained on",
        )
    return tensor.reshape(tuple(shape))
