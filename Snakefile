# Executes every notebook of notebooks/manifest.yaml in one tier; `make run` is the usual way in.
#   snakemake -c 2 --config tier=default notebooks=10_vit_pruning,20_mllm_pruning
# The same file runs on a cluster with Snakemake's executor plugin for it.
import sys
from pathlib import Path

import yaml

TIER = config.get("tier", "default")
MANIFEST = yaml.safe_load(Path("notebooks/manifest.yaml").read_text()) or {}
NOTEBOOKS = config["notebooks"].split(",") if config.get("notebooks") else list(MANIFEST)
FAMILIES = {entry["family"] for entry in MANIFEST.values()}
MEASURED = {"kernels": "kernels/bench/*.csv", "kv": "data/parity/*.csv"}  # what else a family's notebooks read

unknown = sorted(set(NOTEBOOKS) - set(MANIFEST))
if unknown:
    raise WorkflowError(f"not in notebooks/manifest.yaml: {', '.join(unknown)}. There are: {', '.join(MANIFEST)}")


def sources(wildcards):
    """What a notebook's results depend on: itself, tier file, models, claims, and the library without other families' packages."""
    name, entry = wildcards.notebook, MANIFEST[wildcards.notebook]
    package = Path("lib/keeprate")
    others = {package / "train"}
    if (package / entry["family"]).is_dir():
        others |= {package / family for family in FAMILIES - {entry["family"]}}
    code = [p for p in (*package.rglob("*.py"), *Path("kernels").rglob("*.py")) if not others & set(p.parents)]
    # Only what exists: a tier file or model that is missing fails its own notebook, with a message of its own.
    data = [*Path("data/tiers").glob(f"{TIER}/{name}.yaml"), *Path("data/claims").glob("*.yaml")]
    data += [card for model in entry.get("models", []) for card in Path("data/models").glob(f"{model}/card.json")]
    data += Path().glob(MEASURED[entry["family"]]) if entry["family"] in MEASURED else []
    return [f"notebooks/{name}.ipynb", *map(str, code + data)]


rule all:
    input:
        expand("runs/{notebook}/{tier}.done", notebook=NOTEBOOKS, tier=TIER),


rule notebook:
    input:
        sources,
    output:
        "runs/{notebook}/{tier}.done",
    # A notebook that measures time gets every core to itself, the others one each.
    threads: lambda wildcards: workflow.cores if MANIFEST[wildcards.notebook].get("timing") else 1
    shell:
        "OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads} "
        "{sys.executable} -P -m keeprate.execute {wildcards.notebook} --tier {wildcards.tier} --out runs"
