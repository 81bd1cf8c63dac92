"""Models of the conformance suite, built and saved once a session."""

import pytest
import torch

from .checkpoints import CHECKPOINTS, DECODERS, save


class Zoo:
    """Tiny checkpoints by name; each loaded once per dtype and attention implementation."""

    def __init__(self, folder):
        self.folder, self.paths, self.models = folder, {}, {}

    def path(self, name: str):
        if name not in self.paths:
            self.paths[name] = save(name, self.folder)
        return self.paths[name]

    def __call__(self, name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
        key = (name, dtype, attention)
        if key not in self.models:
            cls = (CHECKPOINTS | DECODERS)[name][1]
            self.models[key] = cls.from_pretrained(self.path(name), dtype=dtype, attn_implementation=attention).eval()
        return self.models[key]

    def exact(self, name: str):
        """An fp32 model whose weights are exact in bf16, so that both precisions compute the same function."""
        model = (CHECKPOINTS | DECODERS)[name][1].from_pretrained(self.path(name), attn_implementation="sdpa").eval()
        return model.bfloat16().float()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are several times slower on several threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    return Zoo(tmp_path_factory.mktemp("checkpoints"))
