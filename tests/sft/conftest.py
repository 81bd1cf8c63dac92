"""A tiny Llama and a toy data set for the fine-tuning tests."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 40


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are several times slower on several threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def llama(_llama):
    """A model of one's own."""
    return copy.deepcopy(_llama)


@pytest.fixture
def rows() -> list[dict]:
    """24 sequences of 8 to 16 tokens; the first three are a prompt. Tokens of group 1 are drawn, the others repeat."""
    g = torch.Generator().manual_seed(1)
    found = []
    for i in range(24):
        length = 8 + i % 9
        ids = torch.arange(length) % 5 + 3 + i % 4
        noisy = torch.rand(length, generator=g) < 0.3
        ids = torch.where(noisy, torch.randint(3, VOCABULARY, (length,), generator=g), ids)
        labels = ids.clone()
        labels[:3] = -100
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "group": noisy.long().tolist()})
    return found
