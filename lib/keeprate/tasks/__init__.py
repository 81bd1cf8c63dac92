"""Tasks that know the truth: digits on photographs, recall in reference text; or public data."""

from keeprate.tasks import docs, recall
from keeprate.tasks.images import EMBEDDED, Task, task

__all__ = ["EMBEDDED", "Task", "docs", "recall", "task"]
