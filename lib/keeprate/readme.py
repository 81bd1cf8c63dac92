"""Keep README.md true: its tables come from the registry and the cards, its figure from a run.

`python -m keeprate.readme` rewrites what stands between the markers; a test fails when they disagree.
"""

import re
from pathlib import Path

import keeprate as kr
from keeprate import ledger, project

FIGURE = ("10_vit_pruning", "tokens_kept", "docs/vit_kept_tokens.svg")  # notebook, its figure, the copy in the README


def method_table() -> str:
    """The methods as Markdown, with links to arXiv."""
    table = kr.methods()
    table["paper"] = [
        f"[{paper}](https://arxiv.org/abs/{arxiv})" if arxiv else paper
        for paper, arxiv in zip(table["paper"], table["arxiv"], strict=True)
    ]
    table["reconstructed"] = table["reconstructed"].map({True: "yes", False: ""})
    return table.drop(columns="arxiv").to_markdown(index=False)


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
