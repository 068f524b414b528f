"""R20 and R21: several adapters on one model, per sample and side by side."""

from __future__ import annotations

import inlay
from inlay.testing.cases import NAME, Case
from inlay.testing.effects import (
    acting,
    close,
    output,
    output_of,
    same_output,
    share,
    stir,
    tensors_of,
    train,
)
from inlay.testing.models import batch_for
from inlay.testing.rule import need, rule
from inlay.testing.rules.attaching import no_trace
from inlay.testing.rules.calls import padded
from inlay.testing.snapshots import same_bits, snapshot


@rule(
    "R20",
    "A routed batch equals each sample alone",
    means="row i of a batch routed to different stacks equals that sample run by itself under its own "
    "stack, to 1e-5, whatever faces the stacks have.",
    usually="a delta mixes rows, keeps tensors of the batch's size, or reads the batch's mask for all rows.",
    dtypes=("float32",),
)
def routes_rows(case: Case) -> None:
    model = acting(case)
    case.attach(model, "de", seed=case.seed + 1)
    stir(model, case, "de")
    first, last = (f"{NAME}/{m.name}" for m in (case.members[0], case.members[-1]))
    rows: list[str | tuple[str, ...] | None] = ["de", NAME, None, NAME, (first,), ("de", last)]
    batch = padded(batch_for(model, rows=len(rows), seed=case.seed))
    with inlay.route(model, rows):
        routed = output(model, batch)
    for number, row in enumerate(rows):
        names = () if row is None else (row,) if isinstance(row, str) else row
        alone = output_of(model, *names, batch={k: v[number : number + 1] for k, v in batch.items()})
        mine = routed[number : number + 1]
        need(
            close(mine, alone, 1e-5), f"row {number} ({row}) is {share(mine, alone):.1e} off the sample alone"
        )
    need(share(routed, output_of(model, batch=batch)) > 0, "routing had no effect")


@rule(
    "R21",
    "Two adapters of one method leave each other alone",
    means="attaching, training and detaching a second adapter of the same stack moves no bit of the "
    "first, nor of its output.",
    usually="a tensor lives on the class, in a default argument, or on the base module under a fixed name.",
)
def adapters_are_apart(case: Case) -> None:
    model = acting(case)
    before, own, shown = snapshot(model), tensors_of(model), output(model)
    case.attach(model, "de", seed=case.seed + 1)
    same_output(shown, output_of(model, NAME), "attaching a second adapter")
    stir(model, case, "de")
    inlay.set_trainable(model, "de")
    train(model, "AdamW", steps=2)
    wrong = [k for k, t in tensors_of(model).items() if not same_bits(t, own[k])]
    need(not wrong, f"training 'de' changed {wrong[:1]}")
    same_output(shown, output_of(model, NAME), "training a second adapter")
    need(share(output_of(model, NAME, "de"), shown) > 0, "the second adapter has no effect")
    inlay.detach(model, "de")
    inlay.set_trainable(model, NAME)
    no_trace(before, model, "attaching, training and detaching a second adapter")
    same_output(shown, output(model), "detaching a second adapter")
