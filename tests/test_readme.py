"""What the README shows must run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_your_own_model_in_30_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) - lines.index("class MyTask(SplitTask):") <= 30
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    found = re.search(r"'accuracy': ([0-9.]+)", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) > 0.7


def test_files_that_the_readme_links_to_exist() -> None:
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []
