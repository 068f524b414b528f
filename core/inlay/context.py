"""What holds during one call of the model: which adapters act, for which rows, and shared values.

A `Slot` belongs to one model and keeps one `Call` per thread. Sites read it; nothing here is global.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.errors import AttachError, RoutingError
from inlay.kept import Kept, beside, follow

if TYPE_CHECKING:
    from inlay.adapter import Adapter
    from inlay.programs import Table
    from inlay.sites import Site
    from inlay.stack import Placed
    from inlay.weights import Level

BATCH_ARGUMENTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features",
                   "hidden_states", "input")  # fmt: skip


class Slot(threading.local):
    """One model's current call in this thread, and tensors on their way between modules of a sublayer."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.taps: dict[str, Tensor] = {}
        self.rows: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        copied = memo[id(self)] = Slot()
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, ()


class Call:
    """One call of the model, or, between calls, what `use` and `route` chose for this thread.

    `table` holds the compiled program of every host. `rows` names the stack of each row of the
    batch (indices into `table.stacks`), or None where all rows share one. `tasks` are the task ids
    given to `route`. `arguments` are those of the model's own call.
    """

    def __init__(
        self, table: Table, slot: Slot, *, rows: tuple[int, ...] | None = None, tasks: Tensor | None = None
    ) -> None:
        self.table, self.programs, self.slot, self.rows, self.tasks = table, table.programs, slot, rows, tasks
        self.prepared: dict[Hashable, Mapping[str, Tensor]] = {}
        self.batch: int | None = None
        self.recording: dict[str, tuple[Tensor, Tensor]] | None = None
        self.until: Any = None  # a block: a run of the model that ends where it begins
        self.tokens: dict[str, int] = {}  # how many tokens came in where virtual rows went in front
        self.front: Tensor | None = None  # which of these rows are a sample's own (B, P), if not all are
        self.model: Any = None
        self._past: int | None = None
        self._kept: dict[Any, Any] = {}
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._indices: dict[Any, Tensor] = {}

    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return this choice of adapters bound to one call of `model`."""
        call = Call(self.table, self.slot, rows=self.rows, tasks=self.tasks)
        call.model, call._args, call._kwargs = model, args, kwargs
        call.batch = None if self.rows is None and self.tasks is None else call._batch_size()
        if call.tasks is not None and call.batch is not None:
            call.tasks = call.tasks.repeat_interleave(
                self._repeats(len(call.tasks), call.batch, "the task ids")
            )
        if self.table.reads_call:
            call._past = call.past_length  # now: the cache grows layer by layer while the call runs
        return call

    def with_prepared(self, prepared: dict[Hashable, Mapping[str, Tensor]]) -> Call:
        """Return a copy of this call that reads other prepared tensors."""
        call = copy.copy(self)
        call.prepared = prepared
        return call

    def prepare(self) -> None:
        """Compute what methods prepare once per call; during generation, once per generation."""
        keep = self.store if self.table.prepares and not torch.is_grad_enabled() else {}
        for key, compute in self.table.prepares:
            if key not in keep:
                keep[key] = compute(self)
            self.prepared[key] = keep[key]

    def argument(self, name: str) -> Any:
        """Return the argument `name` of the model's call, or None."""
        if name in self._kwargs:
            return self._kwargs[name]
        if not self._args:
            return None
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        return dict(zip(names, self._args, strict=False)).get(name)

    @property
    def mask(self) -> Tensor | None:
        """The 2-D mask of real tokens (B, T), if the caller gave one."""
        mask = self.argument("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def task_ids(self, known: int) -> tuple[Tensor, Tensor]:
        """Return this batch's distinct tasks, and each row's place among them; raise if none were given."""
        if self.tasks is None or self.tasks.min() < 0 or self.tasks.max() >= known:
            raise RoutingError(
                "the adapter needs to know each row's task",
                saw=f"tasks={None if self.tasks is None else self.tasks.tolist()}; it knows 0 to {known - 1}",
                do="call the model inside inlay.route(model, name, tasks=[...])",
            )
        distinct, which = torch.unique(self.tasks, return_inverse=True)
        return distinct, which

    @property
    def past_length(self) -> int:
        """How many tokens the cache held before this call: 0 for a first chunk, more in decoding."""
        if self._past is not None:
            return self._past
        cache = self.argument("past_key_values")
        return 0 if cache is None else int(cache.get_seq_length())

    def real(self, length: int, *, decoder: bool = False) -> Tensor | None:
        """Return which of this chunk's `length` tokens are real (B, length), or None if nothing says.

        `generate` gives static caches a mask (B, 1, T, S): there a real token is one that sees itself.
        """
        mask = self.argument("decoder_attention_mask" if decoder else "attention_mask")
        mask = next(iter(mask.values())) if isinstance(mask, dict) else mask
        if not isinstance(mask, Tensor):
            return None
        if mask.dim() == 4:
            own = min(self.past_length, mask.shape[-1] - length)  # a sliding window holds no more columns
            mask = mask[:, 0].diagonal(max(own, 0), -2, -1)
            return self._with_front(mask if mask.dtype == torch.bool else mask >= 0, length)
        return self._with_front(mask[:, -length:].bool(), length)

    def _with_front(self, mask: Tensor, length: int) -> Tensor:
        """Return a mask of tokens (B, T) as one of `length` columns: virtual rows stand in front."""
        width = length - mask.shape[1]
        if width <= 0:
            return mask
        front = mask.new_ones(mask.shape[0], width) if self.front is None else self.front
        return torch.cat([front, mask], dim=1)

    @property
    def store(self) -> dict[Any, Any]:
        """A dict that lives as long as the cache of this generation; without one, as long as this call."""
        cache = self.argument("past_key_values")
        return self._kept if cache is None else beside(cache)

    def kept(self, who: Hashable, rows: Tensor | None) -> Kept:
        """Return what `who` keeps of the batch's `rows` in this generation; it follows beams."""
        cache = self.argument("past_key_values")
        if cache is not None:
            follow(cache)
        kept: Kept = self.store.setdefault(who, Kept())
        kept.rows = rows
        return kept

    def hand_over(self, output: Any) -> None:
        """Put what was kept during this call beside the cache that the model made in it, if it made one."""
        made = getattr(output, "past_key_values", None) if self._kept else None
        if hasattr(made, "get_seq_length") and not torch.compiler.is_compiling():
            beside(made).update(self._kept)
            follow(made)

    def expanded_rows(self, size: int, name: str) -> tuple[int, ...]:
        """Return the stack of each of `size` rows; beams repeat the rows of the route k times."""
        assert self.rows is not None
        repeat = self._repeats(len(self.rows), size, name)
        return tuple(row for row in self.rows for _ in range(repeat))

    def _repeats(self, given: int, size: int, name: str) -> int:
        """Return how often each given row stands in a batch of `size` (beams), or raise."""
        repeat, rest = divmod(size, given)
        if rest or repeat == 0 or (self.batch is not None and size != self.batch):
            raise RoutingError(
                f"{name} cannot be routed per sample",
                saw=f"its input has leading size {size}, the route names {given} rows"
                + (f" and the batch has {self.batch}" if self.batch is not None else ""),
                do="route one name for the whole batch, or choose targets that see (batch, …) tensors",
            )
        return repeat

    def index(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return row numbers as a tensor, made once per call and device."""
        key = (tuple(rows), device)
        if key not in self._indices:
            self._indices[key] = torch.tensor(rows, device=device)
        return self._indices[key]

    def _batch_size(self) -> int | None:
        for name in BATCH_ARGUMENTS:
            value = self.argument(name)
            if isinstance(value, Tensor) and value.dim() > 0:
                return int(value.shape[0])
        first = next((a for a in self._args if isinstance(a, Tensor) and a.dim() > 0), None)
        return None if first is None else int(first.shape[0])


class At:
    """Place and moment, as a delta sees them. Made once per program; reads the slot when asked."""

    __slots__ = ("level", "placed", "prepare", "site", "slot")

    def __init__(self, site: Site, slot: Slot, placed: Placed | Inside, level: Level | None) -> None:
        self.site, self.slot, self.placed, self.level = site, slot, placed, level

    @property
    def adapter(self) -> Adapter:
        return self.placed.adapter

    @property
    def call(self) -> Call | None:
        """The call under way, or None if a part of the model is called by itself."""
        return self.slot.call

    @property
    def rows(self) -> Tensor | None:
        """The numbers of the batch's rows this delta sees now, or None for all of them."""
        return self.slot.rows

    def own(self, per_row: Tensor) -> Tensor:
        """Return the entries of a tensor (B, …) that belong to the rows this delta sees now."""
        return per_row if self.slot.rows is None else per_row.index_select(0, self.slot.rows)

    @property
    def mask(self) -> Tensor | None:
        """The 2-D mask of real tokens (rows, T) of the rows this delta sees, if the caller gave one."""
        mask = None if self.slot.call is None else self.slot.call.mask
        return None if mask is None else self.own(mask)

    def real(self, x: Tensor) -> Tensor | None:
        """Return which tokens of x (rows, T, d) are real (rows, T), or None if the caller did not say.

        Knows the encoder's tokens (which cross-attention's keys and values read, too) from the
        decoder's, and a decode step's from those in the cache.
        """
        if self.slot.call is None:
            return None
        site = self.site
        encoded = site.cross and site.role in ("key", "value")
        mask = self.slot.call.real(x.shape[1], decoder=site.side == "decoder" and not encoded)
        return mask if mask is None or mask.shape[0] == 1 else self.own(mask)

    @property
    def store(self) -> dict[Any, Any]:
        """What this part keeps at this site during one generation; empty at its start.

        A tensor in it has a row for each row the delta sees: beam search reorders them.
        """
        call = self.slot.call
        return {} if call is None else call.kept((self.placed.id, self.site.name), self.rows)

    @property
    def tasks(self) -> Tensor | None:
        """The task ids (rows,) given to `route`, of the rows this delta sees."""
        tasks = None if self.slot.call is None else self.slot.call.tasks
        return None if tasks is None else self.own(tasks)

    @property
    def weight(self) -> Tensor:
        """Weight (out, in) of the level below this member, float32 or wider."""
        assert self.level is not None
        return self.level.weight

    @property
    def bias(self) -> Tensor | None:
        assert self.level is not None
        return self.level.bias

    @property
    def x(self) -> Tensor:
        """What the attention module reads (B, T, d), for deltas that declare `reads = {"x"}`."""
        return self.slot.taps[f"{self.site.name}/x"]

    @property
    def residual(self) -> Tensor:
        """What will be added to a sublayer's output (B, T, d)."""
        try:
            return self.slot.taps[f"{self.site.name}/residual"]
        except KeyError:
            raise AttachError(
                "the residual of a sublayer is not known before its output",
                saw=f"{self.site.name}: its norm runs after the residual is added (BART, DistilBERT)",
                do="use a method that reads only the sublayer's input or output (lora, houlsby, parallel)",
            ) from None

    def norm(self, h: Tensor) -> Tensor:
        """Apply the layer norm that follows the residual add, if the model has one there."""
        norm = getattr(self.site, "norm", None)
        return h if norm is None else norm(h)

    @property
    def prepared(self) -> Mapping[str, Tensor]:
        """What the method's `prepare` hook computed for this call."""
        return self.placed.prepared(self.slot.call)

    def part(self, name: str) -> At:
        """Return this place and moment as the method inside that is called `name` sees them."""
        return At(self.site, self.slot, Inside(self.placed, name), self.level)


class Inside:
    """A method inside another one at work on a model: what its deltas see in the place of a `Placed`."""

    def __init__(self, outer: Placed | Inside, name: str) -> None:
        self.outer, self.name = outer, name

    @property
    def id(self) -> Any:
        return (self.outer.id, self.name)

    @property
    def adapter(self) -> Adapter:
        return self.outer.adapter.children[self.name]

    def prepared(self, call: Call | None) -> Mapping[str, Tensor]:
        return Under(self.name, self.outer.prepared(call))


class Under(Mapping[str, Tensor]):
    """The entries of a mapping under "<name>/", without that prefix."""

    def __init__(self, name: str, entries: Mapping[str, Tensor]) -> None:
        self.prefix, self.entries = f"{name}/", entries

    def __getitem__(self, key: str) -> Tensor:
        return self.entries[self.prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (k.removeprefix(self.prefix) for k in self.entries if k.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def take_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Split a call into its first argument, positional or by name, and the rest."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(kwargs))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}
