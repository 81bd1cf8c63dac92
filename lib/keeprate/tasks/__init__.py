"""Tasks that know the truth: digits on photographs, recall in reference text, scenes to ask about; or public data."""

from keeprate.tasks import docs, finetune, reading, recall, vqa
from keeprate.tasks.images import EMBEDDED, Task, task
from keeprate.tasks.reading import questions

__all__ = ["EMBEDDED", "Task", "docs", "finetune", "questions", "reading", "recall", "task", "vqa"]
