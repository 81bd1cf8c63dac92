"""A papermill engine whose kernels talk over Unix sockets instead of TCP ports.

Two kernels that start at the same moment can pick the same free TCP port, and one of them dies before it replies;
socket files in a folder of their own cannot collide. Use it with `papermill --engine keeprate in.ipynb out.ipynb`.
"""

import os
import tempfile
from typing import Any

from papermill.engines import NBClientEngine, NotebookExecutionManager
from traitlets.config import Config


class IPCEngine(NBClientEngine):
    """Papermill's own engine, with the kernel's connection moved to Unix sockets in a private temporary folder."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, cuda_visible_devices: str | None = None, **kwargs: Any
    ) -> Any:
        """Execute the notebook held by `nb_man`.

        Args:
            nb_man: papermill's manager; the notebook in it is updated cell by cell.
            kernel_name: kernel specification to start.
            cuda_visible_devices: the GPUs this run may see, as the environment variable of that name takes them.
            kwargs: passed on to papermill's engine.
        """
        if cuda_visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = cuda_visible_devices
        # A socket's path may hold about 100 characters, which $TMPDIR alone can exceed; /tmp is short.
        with tempfile.TemporaryDirectory(prefix="kr-", dir="/tmp") as folder:
            manager = {"transport": "ipc", "connection_file": f"{folder}/k.json"}
            return super().execute_managed_notebook(nb_man, kernel_name, config=Config(KernelManager=manager), **kwargs)
