"""An estimate in words."""

from __future__ import annotations

from collections.abc import Sequence

from inlay_train.estimate.request import DTYPES
from inlay_train.estimate.result import TOLD, Estimate
from inlay_train.known import columns

LEFT_OUT = {
    "cpu": "left out: libraries and threads, what kernels hold outside torch's allocator",
    "cuda": "left out: the CUDA context and kernels' workspaces, and what fragmentation costs; counted on "
    "kernels of the CPU with attention fused, and not measured on a GPU",
}


def lines(found: Estimate) -> list[str]:
    """Return the estimate as a text, a line each."""
    return [*_parameters(found), "", *_bytes(found), "", *_remarks(found)]


def _parameters(found: Estimate) -> list[str]:
    rows = [("base", f"{found.parameters:,}", "")]
    rows += [(name, f"{count:,}", _share(count, found)) for name, count in found.parts]
    rows += [("learn", f"{found.learning:,}", _share(found.learning, found))]
    return [f"{found.architecture}, {_step(found)}", "", *columns([("parameters", "", "of the base"), *rows])]


def _step(found: Estimate) -> str:
    request = found.request
    told = [f"{request.batch:,} × {request.length:,} tokens", DTYPES[request.dtype], request.optimizer]
    told += [request.quantize] if request.quantize else []
    told += ["checkpointing"] if request.checkpointing else []
    if request.processes > 1:
        told.append(f"{'FSDP' if request.fsdp else 'DDP'} over {request.processes} processes")
    return ", ".join([*told, f"on {request.device}"])


def _share(count: int, found: Estimate) -> str:
    return f"{100 * count / max(1, found.parameters):.3g} %"


def _bytes(found: Estimate) -> list[str]:
    rows: list[Sequence[str]] = [("bytes of a device", "at the peak", "at most")]
    rows += [(TOLD[line.kind], size(line.at_peak), size(line.most)) for line in found.lines]
    return columns([*rows, ("total", size(found.total), "")])


def _remarks(found: Estimate) -> list[str]:
    told = [f"peak: {found.where}", f"activations kept for backward: {size(found.kept)}"]
    if found.paged:
        told.append(f"optimizer state in the host's memory, paged: {size(found.paged)}")
    if found.memory is not None:
        told.append(_fits(found))
    return [*told, LEFT_OUT[found.request.device]]


def _fits(found: Estimate) -> str:
    given = size(found.memory or 0)
    if not found.largest_batch:
        return f"does not fit in {given}: not even a batch of 1"
    said = "fits" if found.fits else "does not fit"
    return f"{said} in {given}; the largest batch that fits is {found.largest_batch:,}"


def size(count: int) -> str:
    """Return bytes in the largest unit that leaves a digit before the point."""
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{count} B" if unit == "B" else f"{amount:.2f} {unit}"
