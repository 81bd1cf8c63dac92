"""Run kvpress on the shared checkpoint and write down which positions it keeps. Runs in .venv-parity, without keeprate.

    .venv-parity/bin/python -I parity/theirs.py FOLDER

kvpress says nowhere what it kept: it prunes `cache.layers[i].keys`. Surviving keys are copied as they are, so a kept
key equals, bit for bit, the key of exactly one position in the full cache of the same prompt; that is its position.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import kvpress
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar


def positions(kept: torch.Tensor, full: torch.Tensor) -> list[list[int]]:
    """Where the kept keys [g, k, d] of one layer stand among all of them [g, n, d]: sorted positions of every head.

    Raises:
        RuntimeError: If a kept key equals no key of the full cache, or several.
    """
    equal = (kept[:, :, None] == full[:, None]).all(-1)  # g k n
    if not bool((equal.sum(-1) == 1).all()):
        raise RuntimeError("a kept key does not equal exactly one key of the full cache")
    return equal.int().argmax(-1).sort(-1).values.tolist()


@torch.inference_mode()
def main(folder: Path) -> None:
    disable_progress_bar()
    settings = json.loads((folder / "settings.json").read_text())
    prompts = [torch.tensor([ids]) for ids in settings["prompts"]]
    models, full = {}, {}
    for attention in sorted({case["attention"] for case in settings["cases"]}):
        models[attention] = LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation=attention).eval()
        for i, ids in enumerate(prompts):
            full[attention, i] = DynamicCache()
            models[attention](ids, past_key_values=full[attention, i])
    kept = []
    for case in settings["cases"]:
        press = getattr(kvpress, case["press"])(**case["params"])
        for i, ids in enumerate(prompts):
            cache = DynamicCache()
            with press(models[case["attention"]]):
                models[case["attention"]](ids, past_key_values=cache)
            whole = full[case["attention"], i].layers
            kept.append(
                {
                    "case": case["name"],
                    "prompt": i,
                    "layers": [
                        positions(short.keys[0], long.keys[0]) for short, long in zip(cache.layers, whole, strict=True)
                    ],
                }
            )
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    (folder / "theirs.json").write_text(json.dumps({"versions": versions, "kept": kept}))
    keys = {f"{i}.{n}": x.keys.clone() for i in range(len(prompts)) for n, x in enumerate(full["eager", i].layers)}
    save_file(keys, folder / "theirs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
