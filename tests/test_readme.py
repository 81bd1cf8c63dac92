"""The README says what is true: its tables are current and its code runs as it stands."""

import os
import re
import subprocess
import sys

from keeprate import project, readme


def _text() -> str:
    return (project.root() / "README.md").read_text(encoding="utf-8")


def test_tables_are_generated():
    assert readme.render(_text()) == _text(), "run: python -m keeprate.readme"


def test_code_runs_in_a_fresh_process(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", _text(), flags=re.S)
    assert blocks
    # the last block defines a method without using it: do so, as its reader would
    script = "\n".join(blocks) + "\nwith Unusual(keep=0.5)(vit.model) as trace:\n    vit.model(batch['pixel_values'])\n"
    script += "assert trace.counts()[0, -1] < trace.counts()[0, 0]\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", _text()):
        assert target.startswith("http") or (project.root() / target).is_file(), target
