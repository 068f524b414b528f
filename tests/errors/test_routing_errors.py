"""Routes that do not fit the batch, the model or the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.authoring import Init, Method, OutputDelta, Site
from inlay.errors import RoutingError, StateError
from inlay.stack import need_state
from inlay.testing.models import batch_for, build
from inlay.testing.refusal import refused
from inlay_lora import LoRA
from inlay_prefix import PrefixTuning


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = build("llama")
    inlay.attach(model, LoRA() + PrefixTuning(length=2, hidden=4), "fr", seed=0)
    inlay.attach(model, LoRA(), "de", seed=1, activate=False)
    with torch.no_grad():
        for _, _, p in need_state(model).own_parameters():
            p.add_(0.1)
    return model


NO_ROUTE = [[], (), 5, {"fr": 1}, {"fr"}, [5], ["fr", 5], ["fr", ["de"]], [b"fr"], 1.5]


@pytest.mark.parametrize("names", NO_ROUTE, ids=str)
def test_what_is_no_list_of_names_is_refused(names: Any, model: nn.Module) -> None:
    with refused(RoutingError, "a route needs a name per row", model=model):
        inlay.route(model, names)


@pytest.mark.parametrize(
    ("names", "tasks"),
    [
        (["fr", "de"], [0]),
        (["fr", "de"], [0, 1, 2]),
        (["fr", "de"], [[0, 1]]),
        (["fr", "de"], [0.5, 1.0]),
        ("fr", []),
        (["fr", "de"], ["a", "b"]),
        (["fr", "de"], [0, None]),
        (["fr", "de"], 1),
        (["fr"], torch.zeros(0)),
        ("fr", [2**70]),
    ],
)
def test_task_ids_that_fit_no_rows_are_refused(names: Any, tasks: Any, model: nn.Module) -> None:
    with refused(RoutingError, "a route needs a task id per row", model=model):
        inlay.route(model, names, tasks=tasks)


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_a_route_of_another_length_than_the_batch_is_refused(rows: int, model: nn.Module) -> None:
    """Three names for 1, 2, 4 or 5 rows; for 6 they would mean two beams each."""
    batch = batch_for(model, rows=rows)
    with (
        refused(
            RoutingError,
            rf"cannot be routed per sample[\s\S]*leading size {rows}, the route names 3 rows",
            model=model,
        ),
        torch.no_grad(),
        inlay.route(model, ["fr", "de", None]),
    ):
        model(**batch)
    with torch.no_grad():  # nothing of the route is left
        assert torch.equal(model(**batch).logits, model(**batch).logits)
    with torch.no_grad(), inlay.route(model, ["fr", "de", None]):
        assert model(**batch_for(model, rows=6)).logits.shape[0] == 6


class Packed(nn.Module):
    """A model whose inner layer sees all tokens of the batch in one dimension, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(self.outer(input).flatten(0, 1)).view(input.shape)


def test_a_layer_whose_leading_size_is_not_the_batch_is_refused_by_name() -> None:
    model = Packed()
    inlay.attach(model, LoRA(rank=2, targets=["inner"]), "fr")
    inlay.attach(model, LoRA(rank=2, targets=["outer"]), "de")
    x = torch.randn(2, 3, 4)
    with (
        refused(
            RoutingError,
            r"inner cannot be routed per sample[\s\S]*leading size 6, .* 2 rows and the batch has 2",
            model=model,
        ),
        inlay.route(model, ["fr", None]),
    ):
        model(x)
    with inlay.route(model, "fr"):
        model(x)
    with inlay.route(model, ["de", None]):
        model(x)


class PerTask(OutputDelta):
    """Δy = a vector of the row's task."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__()
        self.table = init.normal(3, site.out_features)

    def forward(self, x: Tensor, y: Tensor, at: Any) -> Tensor:
        distinct, which = at.call.task_ids(3)
        return self.table[distinct][which][:, None]


@dataclass(frozen=True)
class Tasks(Method):
    id: ClassVar[str] = "tasks"
    reads_call: ClassVar[bool] = True
    starts_as_identity: ClassVar[bool] = False

    def delta(self, site: Site, init: Init) -> PerTask:
        return PerTask(site, init)


def test_a_method_that_needs_tasks_says_so() -> None:
    model = build("llama")
    inlay.attach(model, Tasks(), "fr")
    batch = batch_for(model, rows=2)
    match = r"the adapter needs to know each row's task[\s\S]*tasks=None; it knows 0 to 2"
    with refused(RoutingError, match, model=model), torch.no_grad():
        model(**batch)
    for wrong in ([0, 3], [-1, 0]):
        with (
            refused(RoutingError, "needs to know each row's task", model=model),
            torch.no_grad(),
            inlay.route(model, "fr", tasks=wrong),
        ):
            model(**batch)
    with (
        refused(
            RoutingError, r"the task ids cannot be routed per sample[\s\S]*route names 3 rows", model=model
        ),
        torch.no_grad(),
        inlay.route(model, "fr", tasks=[0, 1, 2]),
    ):
        model(**batch)
    with torch.no_grad(), inlay.route(model, "fr", tasks=[0, 2]):
        model(**batch)


def test_a_route_is_over_after_an_error(model: nn.Module) -> None:
    batch = batch_for(model)
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(ZeroDivisionError), inlay.use(model, "de"), inlay.route(model, ["fr", None, "de"]):
            raise ZeroDivisionError
        assert torch.equal(model(**batch).logits, before)
    with refused(StateError, "no adapter is called 'it' here", model=model):
        inlay.route(model, ["fr", "it"])
