"""Two processes that share a batch, as under the Trainer with DistributedDataParallel: the gradient of one process."""

import json
import os
import socket
import subprocess
import sys

import torch
from safetensors.torch import load_file

import keeprate as kr
from keeprate.sft import Collator

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
import keeprate as kr
from keeprate.sft import Collator

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2)
rows = json.load(open(f"{folder}/rows.json"))
for name in ("Rho1", "PDL", "DFT"):
    method = kr.method(name, **({"scope": "sequence"} if name == "Rho1" else {}))
    model = LlamaForCausalLM.from_pretrained(folder)
    wrapped = DistributedDataParallel(model)
    # micro-batches of different sizes; the second of process 1 has no target
    cut = [rows[:1], rows[1:5]] if rank == 0 else [rows[5:8], [{**rows[8], "labels": [-100] * len(rows[8]["labels"])}]]
    batches = [Collator(pad=0)(part) for part in cut]
    items = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches))
    dist.all_reduce(items)
    with method(model):
        for i, batch in enumerate(batches):
            labels = batch.pop("labels")
            with wrapped.no_sync() if i == 0 else torch.enable_grad():
                # the Trainer multiplies by the number of processes, over which the gradient is averaged
                (2 * method(wrapped(**batch), labels, items)).backward()
    if rank == 0:
        save_file({n: p.grad for n, p in model.named_parameters()}, f"{folder}/{name}.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


def test_processes_share_one_denominator(llama, rows, tmp_path):
    rows = kr.sft.frequency(rows)
    g = torch.Generator().manual_seed(0)
    rows = [{**row, "reference": torch.rand(len(row["labels"]), generator=g).tolist()} for row in rows][:9]
    llama.save_pretrained(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(rank)], env=environment, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        _, told = worker.communicate(timeout=300)
        assert worker.returncode == 0, told.decode()[-2000:]
    rows[8] = {**rows[8], "labels": [-100] * len(rows[8]["labels"])}
    for name in ("Rho1", "PDL", "DFT"):
        method = kr.method(name, **({"scope": "sequence"} if name == "Rho1" else {}))
        batch = Collator(pad=0)(rows)
        labels = batch.pop("labels")
        llama.zero_grad()
        with method(llama):
            method(llama(**batch), labels).backward()
        shared = load_file(tmp_path / f"{name}.safetensors")
        for parameter, value in llama.named_parameters():
            assert torch.allclose(shared[parameter], value.grad, atol=1e-6), (name, parameter)
