"""What can be learnt from a table of texts, a module per task."""

from inlay_train.tasks.causal_lm import CausalLM
from inlay_train.tasks.classification import Classification
from inlay_train.tasks.seq2seq import Seq2Seq
from inlay_train.tasks.task import Columns, Examples, Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, CausalLM, Seq2Seq)}

__all__ = ["TASKS", "CausalLM", "Classification", "Columns", "Examples", "Seq2Seq", "Task"]
