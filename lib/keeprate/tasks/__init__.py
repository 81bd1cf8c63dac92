"""Tasks by name: images with labels and, where the task knows it, the patches that matter."""

from keeprate.tasks.images import EMBEDDED, Task, task

__all__ = ["EMBEDDED", "Task", "task"]
