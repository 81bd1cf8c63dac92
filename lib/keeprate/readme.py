"""Keep README.md true: its tables come from the registry and the cards, its figure from a run.

`python -m keeprate.readme` rewrites what stands between the markers; a test fails when they disagree.
"""

import re
from pathlib import Path

import pandas as pd

import keeprate as kr
from keeprate import ledger, project

FAMILIES = {  # in the order of the README
    "vit": "Vision transformers",
    "mllm": "Visual tokens in multimodal models",
    "kv": "KV cache",
    "sft": "Token-weighted fine-tuning",
}
FIGURE = ("10_vit_pruning", "tokens_kept", "docs/vit_kept_tokens.svg")  # notebook, its figure, the copy in the README


def method_table() -> str:
    """The methods as Markdown, one table a family, with links to arXiv."""
    return "\n\n".join(f"### {title}\n\n{_family_table(family)}" for family, title in FAMILIES.items())


def _family_table(family: str) -> str:
    """One family: what all its methods run on in a line above, the rest as a table."""
    table = kr.methods(family)
    table["paper"] = [
        f"[{paper}](https://arxiv.org/abs/{arxiv})" if arxiv else paper
        for paper, arxiv in zip(table["paper"], table["arxiv"], strict=True)
    ]
    table["year"] = ["" if pd.isna(year) else str(year) for year in table["year"]]  # a baseline may have no paper
    table["reconstructed"] = table["reconstructed"].map({True: "yes", False: ""})
    table = table.drop(columns=["arxiv", "family"])
    above = ""
    if table["architectures"].nunique() == 1:
        above = f"On {table['architectures'].iloc[0]}.\n\n"
        table = table.drop(columns="architectures")
    return above + table.to_markdown(index=False)


def model_table() -> str:
    """The embedded models as Markdown."""
    return kr.models().to_markdown(index=False)


def render(text: str) -> str:
    """README with the parts between its markers made anew.

    Raises:
        ValueError: If a marker is missing.
    """
    for name, table in (("models", model_table()), ("methods", method_table())):
        marks = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        text, found = re.subn(f"{marks[0]}.*{marks[1]}", lambda _: f"{marks[0]}\n{table}\n{marks[1]}", text, flags=re.S)  # noqa: B023
        if found != 1:
            raise ValueError(f"README.md must hold {marks[0]} ... {marks[1]} once; found {found}")
    return text


def copy_figure(runs: Path) -> bool:
    """Copy the figure of the latest default run; False where there is none."""
    notebook, figure, target = FIGURE
    status = ledger.read_status(runs, notebook, "default") or {}
    source = runs / notebook / str(status.get("run")) / "figures" / f"{figure}.svg"
    if source.is_file():
        project.write_text(project.root() / target, source.read_text(encoding="utf-8"))
    return source.is_file()


def main() -> None:
    """Rewrite README.md and its figure."""
    path = project.root() / "README.md"
    project.write_text(path, render(path.read_text(encoding="utf-8")))
    copied = copy_figure(project.root() / "runs")
    print(f"{path} rewritten; figure {'copied' if copied else 'left alone: no default run of ' + FIGURE[0]}")


if __name__ == "__main__":
    main()
