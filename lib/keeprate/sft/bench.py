"""What a training step costs with each method, against plain fine-tuning: `python -m keeprate.sft.bench`.

A step is forward, loss and backward of a Llama with random weights. Both take turns on the same batch, so a ratio
holds on a busy machine. Memory is the peak of all tensors beyond model and batch.
"""

import argparse

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keeprate.method import method as build
from keeprate.method import methods
from keeprate.sft.base import SFTMethod
from keeprate.sft.data import Collator
from keeprate.sft.ntl import NTL
from keeprate.sft.scores import frequency
from keeprate.sft.tokencleaning import TokenCleaning
from keeprate_kernels.bench.clock import peak_memory, race


def model(vocabulary: int, width: int, layers: int, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama with random weights, ready for training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device, dtype).train()


def rows(vocabulary: int, batch: int, length: int) -> list[dict]:
    """Random sequences, every token a target, with every column that a method may ask for."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(batch):
        row = {"input_ids": torch.randint(10, vocabulary, (length,), generator=g).tolist()}
        for name in ("reference", "base", "history", "shuffled", "original", "forget"):
            row[name] = torch.rand(length, generator=g).tolist()
        row["key"] = torch.randint(0, 3, (length,), generator=g).tolist()
        found.append(row)
    return TokenCleaning().prepare(frequency(found))


def measure(
    chosen: list[SFTMethod],
    *,
    vocabulary: int = 50_000,
    batch: int = 4,
    length: int = 1024,
    width: int = 256,
    layers: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 3,
    memory: bool = True,
) -> pd.DataFrame:
    """Time and memory of a step with each method, over plain fine-tuning with labels given to the model.

    Args:
        chosen: The methods.
        vocabulary: Entries of the head.
        batch: Sequences.
        length: Tokens of each.
        width: Of the model.
        layers: Of the model.
        device: Where it runs.
        dtype: Of the weights.
        repeats: Rounds.
        memory: Measure memory, too.

    Returns:
        One row a method: time (median of the ratios of rounds), low, high (quartiles), ms of a step, plain ms, memory
        (ratio), MiB, plain MiB.
    """
    net = model(vocabulary, width, layers, device, dtype)
    made = Collator(pad=0)(rows(vocabulary, batch, length))
    made = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in made.items()}
    labels = made.pop("labels")
    bare = labels.as_subclass(torch.Tensor)

    def plain() -> None:
        net.zero_grad()
        net(**made, labels=bare).loss.backward()

    def ours(objective: SFTMethod) -> None:
        net.zero_grad()
        with objective(net):
            objective(net(**made), labels).backward()

    base = peak_memory(plain, device) / 2**20 if memory else np.nan
    found = []
    for objective in chosen:
        taken = race((plain, lambda objective=objective: ours(objective)), device, repeats, seconds_budget=1e9)
        ratio = taken[:, 1] / taken[:, 0]
        low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        peak = peak_memory(lambda objective=objective: ours(objective), device) / 2**20 if memory else np.nan
        found.append(
            {"method": objective.name, "time": middle, "low": low, "high": high}
            | {"ms": np.median(taken[:, 1]), "plain ms": np.median(taken[:, 0])}
            | {"memory": peak / base, "MiB": peak, "plain MiB": base}
        )
    return pd.DataFrame(found)


def main() -> None:
    """Measure what the command line asks for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods", nargs="*", default=["SFT", "RandomMask", "Rho1", "SsToken", "DFT", "EntropyWeight"]
    )
    parser.add_argument("--all", action="store_true", help="every method of the family")
    for name, value in (("vocabulary", 50_000), ("batch", 4), ("length", 1024), ("width", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = vars(parser.parse_args())
    names = list(methods("sft")["name"]) if given.pop("all") else given["methods"]
    del given["methods"]
    digits = {"digits": tuple(range(10, 20)), "values": tuple(map(float, range(10)))}
    chosen = [build(name, **(digits if name == NTL.__name__ else {})) for name in names]
    dtype = torch.bfloat16 if given["device"].startswith("cuda") else torch.float32
    print(measure(chosen, dtype=dtype, **given).to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    main()
