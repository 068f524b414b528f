"""The configuration of a run: validated data, from a YAML file, options, or both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from inlay import InlayError
from inlay.errors import near
from inlay_train.quantised import FewBits
from inlay_train.tasks.task import Columns

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class RunConfig(BaseModel):
    """Everything that decides what a run does. `method` is a stack, or "head" or "full" to compare with."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    data: Path
    task: Literal["classification", "causal-lm", "seq2seq"]
    method: str
    output: Path
    eval_data: Path | None = None  # chooses the best step, instead of rows held out of the data
    test_data: Path | None = None  # measured once, at the end
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: int = Field(0, ge=0)
    encoding: str = "utf-8"
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    target: str | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None
    train: tuple[str, ...] | None = None  # the base's own tensors that learn too; None: the task's
    epochs: Positive = 3.0
    steps: Count | None = None  # instead of epochs
    batch: Count = 16
    accumulate: Count = 1
    by_length: bool = False  # texts of like length share a batch: less padding
    eval_batch: Count = 64
    lr: Positive | None = None  # instead of each method's own
    rate: Positive = 1.0  # times every learning rate
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    warmup: Share = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    evaluate_every: Count | None = None  # steps; None: once an epoch
    best: bool = True  # end with the best step evaluated, not the last
    keep: Count = 2  # checkpoints
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the base
    adapter_dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: the base's
    master_weights: bool = False  # the optimizer steps on float32 copies of what has 16 bits
    mixed_precision: Literal["bf16", "fp16"] | None = None  # autocast; fp16 with a scaled loss
    bits: Literal[4, 8] | None = None  # of the base's weights (bitsandbytes)
    double_quant: bool | None = None  # of 4 bits: the blocks' scales in 8 bits too; None: yes
    compute_dtype: Literal["float32", "bfloat16"] | None = None  # of layers in 4 bits; None: dtype
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _fits_task(self) -> RunConfig:
        wrong = {"pair": self.pair, "target": self.target}
        wrong.pop("pair" if self.task == "classification" else "target")
        for name, value in wrong.items():
            if value is not None:
                raise ValueError(f"{name} {value!r}: {self.task} reads no such column")
        return self

    @model_validator(mode="after")
    def _fits_bits(self) -> RunConfig:
        for name in ("double_quant", "compute_dtype"):
            if self.bits != 4 and getattr(self, name) is not None:
                value = getattr(self, name)
                raise ValueError(f"{name.replace('_', '-')} {value!r}: it is for a base of 4 bits (--bits 4)")
        return self

    @property
    def few_bits(self) -> FewBits | None:
        """How the base is quantised, if it is."""
        if self.bits is None:
            return None
        return FewBits(self.bits, self.double_quant is not False, self.compute_dtype or self.dtype)

    @property
    def columns(self) -> Columns:
        return Columns(self.text, self.pair, self.label, self.target)

    @property
    def plain(self) -> dict[str, Any]:
        """The configuration as JSON types."""
        return self.model_dump(mode="json")


def make(**settings: Any) -> RunConfig:
    """Return the configuration of these settings; raise one error with everything wrong with them."""
    config, errors = validated(settings)
    if config is None:
        raise merged(errors)
    return config


def validated(values: Mapping[str, Any]) -> tuple[RunConfig | None, list[InlayError]]:
    """Return the configuration, or None and what is wrong with it."""
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        return None, [_told(found) for found in error.errors()]


def from_yaml(file: Path) -> dict[str, Any]:
    """Return the settings in a YAML file; paths in it are relative to the file."""
    try:
        values = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise InlayError(
            "the configuration file cannot be read", saw=f"{file}: {error.strerror}", do="check the path"
        ) from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise InlayError(
            "the configuration file is not YAML",
            saw=f"{file}: {' '.join(str(error).split())[:300]}",
            do="write one setting a line, such as `task: classification`",
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InlayError(
            "the configuration file does not hold settings by name",
            saw=f"{file}: {values!r:.80}",
            do="write one setting a line, such as `task: classification`",
        )
    values = {key.replace("-", "_"): value for key, value in values.items()}
    return {key: _relative(key, value, file.parent) for key, value in values.items()}


def _relative(key: str, value: Any, folder: Path) -> Any:
    """Return a path in a file as seen from here; a model may be a hub id instead."""
    paths = ("data", "eval_data", "test_data", "output")
    if not isinstance(value, str) or key not in (*paths, "model"):
        return value
    return str(folder / value) if key in paths or (folder / value).is_dir() else value


def _told(found: Mapping[str, Any]) -> InlayError:
    """Return one of pydantic's findings in three beats."""
    name = str(found["loc"][0]).replace("_", "-") if found["loc"] else ""
    names = [field.replace("_", "-") for field in RunConfig.model_fields]
    if found["type"] == "missing":
        return InlayError(f"{name} is not given", saw="nothing", do=f"pass --{name}")
    if found["type"] == "extra_forbidden":
        return InlayError(
            f"there is no setting {name!r}", saw=f"{name}: {found['input']!r:.80}", do=near(name, names)
        )
    if not name:
        return InlayError("a setting does not fit the task", saw=_reason(found), do="leave it out")
    return InlayError(
        f"{name} has a value it cannot have",
        saw=f"{name}: {found['input']!r:.80}",
        do=_nearest(found) or _reason(found),
    )


def _reason(found: Mapping[str, Any]) -> str:
    text = str(found["msg"]).removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def _nearest(found: Mapping[str, Any]) -> str:
    """Return "did you mean …?" where a value is nearly one of those allowed."""
    field = RunConfig.model_fields.get(str(found["loc"][0]))
    allowed = (
        [str(v) for v in getattr(field.annotation, "__args__", ()) if isinstance(v, str)] if field else []
    )
    return near(found["input"], allowed) if allowed else ""


def merged(errors: Iterable[InlayError]) -> InlayError:
    """Return one error that says all that these say."""
    errors = list(errors)
    if len(errors) == 1:
        return errors[0]
    return InlayError(
        f"{len(errors)} things stand in the way of this run",
        saw="".join(f"\n  {i}. {e.what}: {_indented(e.saw)}" for i, e in enumerate(errors, 1)),
        do="".join(f"\n  {i}. {_indented(e.do)}" for i, e in enumerate(errors, 1)),
    )


def _indented(text: str) -> str:
    return text.replace("\n", "\n     ")
