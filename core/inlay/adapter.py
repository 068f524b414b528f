"""`Adapter`: one method at work on one model: its deltas by site, its shared parts, its tensors."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from inlay.delta import Delta, Ref
from inlay.errors import AttachError
from inlay.hosts import base_size
from inlay.sites import Site
from inlay.sites.site import hooks_of

if TYPE_CHECKING:
    from inlay.method import Method
    from inlay.sites import ModuleSite
    from inlay.weights import Level


class Adapter:
    """What a method's hooks receive: where it stands, what it owns, and how to make tensors.

    `placed` lists (site, delta) in order. `shared` holds modules used by many sites once (a
    hypernetwork, VeRA's matrices). `data` is plain JSON data of the method's own that is saved
    and is there again when `inject` rebuilds the adapter (a stage, counts of selected entries).
    `path` is its name on the model ("fr/lora"), "" while nothing is attached (a dry run, the trial
    of a file) and inside a composite; `filled` says that a file's values will be put in. `dtype` is
    what its tensors were asked to have, or None: that of the site.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        *,
        model: nn.Module,
        seed: int = 0,
        data: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Tensor] | None = None,
        find: Callable[[str], Adapter] | None = None,
        meta: bool = False,
        filled: bool = False,
        path: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.sites, self.model, self.seed, self.meta = sites, model, seed, meta
        self.filled, self.path, self.dtype = filled, path, dtype
        self.placed: list[tuple[Site, Delta]] = []
        self.shared = nn.ModuleDict()
        self.data: dict[str, Any] = copy.deepcopy(dict(data or {}))
        self.calibration: dict[str, Tensor] = dict(calibration or {})
        self.children: dict[str, Adapter] = {}
        self.fused: list[Adapter] = []
        self._find = find

    def place(self, site: Site, delta: Delta) -> Delta:
        """Put `delta` on `site`; several deltas of one adapter at a site act in this order."""
        if site not in self.sites:
            raise AttachError(
                "a delta was placed on a site the method was not given",
                saw=f"{site.name}, while the method got {len(self.sites)} sites",
                do="place deltas only on the sites passed to inject",
            )
        if delta.face not in site.faces:
            raise AttachError(
                f"a {site.kind} site cannot carry a delta with the {delta.face} face",
                saw=f"{type(delta).__name__} at {site.name}",
                do=f"use one of the faces {sorted(site.faces)}, or other targets",
            )
        self.placed.append((site, delta))
        return delta

    def share(self, name: str, module: nn.Module) -> Ref:
        """Register `module` once for the whole adapter; hand the returned reference to deltas."""
        self.shared[name] = module
        return Ref(module)

    def init(
        self,
        site: Site | None = None,
        *,
        like: Tensor | None = None,
        shared: str = "",
        seed: int | None = None,
    ) -> Init:
        """Return a maker of tensors for `site`, or for the part `shared`: seeded, typed and placed.

        `seed` instead of the adapter's own gives every adapter the same tensors.
        """
        reference = site.reference if site is not None else self.sites[0].reference if like is None else like
        name = shared if site is None else f"{site.name}#{sum(s is site for s, _ in self.placed)}"
        seed = self.seed if seed is None else seed
        made = Init(f"{seed}/{name}", reference, meta=self.meta, filled=self.filled)
        made.dtype = self.dtype or made.dtype
        return made

    def child(self, name: str, method: Method) -> Adapter:
        """Return the adapter of a method inside this one, its deltas made but owned by the caller.

        What `calibrate` measured for it is given here under names that begin with "<name>/".
        """
        from inlay.registry import registry
        from inlay.targets import among

        sites, prefix = among(self.model, self.sites, method), f"{name}/"
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:4], "little")
        measured = {k: self.calibration.pop(k) for k in [*self.calibration] if k.startswith(prefix)}
        inner = Adapter(
            sites, model=self.model, seed=seed, find=self._find, meta=self.meta, filled=self.filled,
            calibration={k.removeprefix(prefix): t for k, t in measured.items()}, dtype=self.dtype,
        )  # fmt: skip
        inner.data = self.data.setdefault(name, {})
        registry.call("inject", method, sites=sites, adapter=inner)
        if inner.shared:
            self.shared[name] = inner.shared
        self.children[name] = inner
        return inner

    def attached(self, name: str) -> Adapter:
        """Return the adapter attached as `name` ("fr" or "fr/part"): for methods that read others."""
        if self._find is None:
            raise AttachError(
                "other adapters cannot be reached here", saw=repr(name), do="attach them first, then this one"
            )
        found = self._find(name)
        self.fused.append(found)
        return found

    def below(self, site: ModuleSite) -> Level:
        """Return the level under this adapter's deltas at a layer: the base, and what acts there before it.

        For what a method does between calls, as ending a stage: within a call a delta reads `at`.
        """
        from inlay.stack import need_state
        from inlay.weights import Level

        state, deltas = need_state(self.model), list[Delta]()
        for placed in (state.placed[number] for number in state.active):
            if placed.adapter is self:
                return Level(site, deltas)
            deltas += [] if placed.merged else placed.adapter.at(site)
        return Level(site, ())

    def at(self, site: Site) -> list[Delta]:
        """Return the deltas placed on `site`."""
        return [delta for s, delta in self.placed if s.name == site.name]

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (local name, module) of every delta and shared part."""
        seen: dict[str, int] = {}
        for site, delta in self.placed:
            count = seen[site.name] = seen.get(site.name, -1) + 1
            yield f"{site.name}#{count}" if count else site.name, delta
        for name, module in self.shared.items():
            yield f"shared.{name}", module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (local name, parameter), each once."""
        for prefix, module in self.modules():
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """The dtype asked for; None if none was, or if `model.to(dtype)` has changed its parameters since."""
        kept = all(p.dtype == self.dtype for _, p in self.named_parameters())
        return self.dtype if kept else None

    @property
    def measured(self) -> dict[str, Tensor]:
        """`calibration`, and that of the methods inside under names that begin with "<name>/"."""
        inside = {f"{n}/{k}": t for n, child in self.children.items() for k, t in child.measured.items()}
        return self.calibration | inside

    @property
    def base_size(self) -> int:
        """How many parameters the base model has, without any adapter's."""
        return base_size(self.model)

    def trainable_names(self) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def tensors(self) -> dict[str, Tensor]:
        """Return every parameter and persistent buffer under its local name."""
        return {
            f"{prefix}.{name}": tensor
            for prefix, module in self.modules()
            for name, tensor in module.state_dict().items()
        }

    def recall(self) -> None:
        """Take the adapter's modules out of accelerate's offload: what is offloaded cannot learn."""
        for part in (part for _, module in self.modules() for part in module.modules()):
            if hooks_of(part):
                from accelerate.hooks import remove_hook_from_module

                remove_hook_from_module(part)


class Init:
    """Makes parameters of the dtype of `reference` on its device, from a seed of the site's own.

    Values are drawn on the CPU in float32, so that one seed gives the same weights on any device
    and in any order of creation. On meta sites nothing is drawn, unless values from a file are to be
    `filled` in: these need not wait for the base's; on fake tensors nothing is drawn at all. `later` says
    that the values will come from elsewhere, or cannot be known yet, so that there is no point in computing
    any.
    """

    def __init__(self, seed: str, reference: Tensor, *, meta: bool = False, filled: bool = False) -> None:
        self.dtype = reference.dtype if reference.is_floating_point() else torch.float32
        there = torch.device("cpu") if filled and reference.is_meta else reference.device
        self.device = torch.device("meta") if meta else there
        self.bare = self.device.type == "meta" or isinstance(reference, FakeTensor)
        self.later = filled or self.bare or reference.is_meta
        self._seed = _number(seed)
        self._generator: torch.Generator | None = None

    def seeded(self, seed: str) -> Init:
        """Return a maker like this one that draws from `seed` alone, whatever the adapter's own is."""
        made = copy.copy(self)
        made._seed, made._generator = _number(seed), None
        return made

    @property
    def generator(self) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self._seed)
        return self._generator

    def tensor(self, value: Tensor) -> nn.Parameter:
        """Return a parameter holding a copy of `value`."""
        made = torch.empty(value.shape, dtype=self.dtype, device=self.device)
        if not (self.device.type == "meta" or value.is_meta):
            made.copy_(value.detach())
        return nn.Parameter(made)

    def full(self, *shape: int, value: float) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, value, dtype=self.dtype, device=self.device))

    def zeros(self, *shape: int) -> nn.Parameter:
        return self.full(*shape, value=0.0)

    def ones(self, *shape: int) -> nn.Parameter:
        return self.full(*shape, value=1.0)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> nn.Parameter:
        """Draw N(mean, std²)."""
        return self._drawn(shape, lambda t: t.normal_(mean, std, generator=self.generator))

    def truncated_normal(self, *shape: int, std: float) -> nn.Parameter:
        """Draw N(0, std²) cut at two standard deviations."""
        cut = 2 * std
        return self._drawn(
            shape, lambda t: nn.init.trunc_normal_(t, 0.0, std, -cut, cut, generator=self.generator)
        )

    def uniform(self, *shape: int, bound: float) -> nn.Parameter:
        """Draw U(-bound, bound)."""
        return self._drawn(shape, lambda t: t.uniform_(-bound, bound, generator=self.generator))

    def kaiming_uniform(self, *shape: int, a: float = math.sqrt(5)) -> nn.Parameter:
        """Draw U(±sqrt(6 / ((1 + a²) fan_in))), fan_in being the product of all but the first dimension."""
        fan_in = math.prod(shape[1:])
        return self.uniform(*shape, bound=math.sqrt(6 / ((1 + a * a) * fan_in)) if fan_in else 0.0)

    def module(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Run `build` with torch's default random state seeded, then move the result here."""
        if self.device.type == "meta":
            with torch.device("meta"):
                return build().to(dtype=self.dtype)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self._seed)
            return build().to(device=self.device, dtype=self.dtype)

    def _drawn(self, shape: tuple[int, ...], draw: Callable[[Tensor], Tensor]) -> nn.Parameter:
        if self.bare:
            return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))
        return nn.Parameter(draw(torch.empty(shape, device="cpu")).to(device=self.device, dtype=self.dtype))


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little")
