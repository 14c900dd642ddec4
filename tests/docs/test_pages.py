"""Every example, command and name on the site's pages and in the README works."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

import kappa_lightning

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# What a page needs before its first example stands in a comment that a reader does not see.
BLOCK = re.compile(r"^(?:```python\n(?P<shown>.*?)^```|<!-- python\n(?P<hidden>.*?)^-->)", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return "\n".join(block["shown"] or block["hidden"] for block in BLOCK.finditer(text))


def commands_of(page: Path) -> list[str]:
    lines = "\n".join(SHELL.findall(page.read_text(encoding="utf-8"))).splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def run(source: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    file = folder / "page.py"
    file.write_text(source, encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), redirect_stdout(StringIO()):
            return runpy.run_path(str(file), run_name=name)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=name_of)
def test_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(python_of(page), "page", tmp_path, monkeypatch)


@pytest.mark.parametrize("seed", [1, 2])
def test_example_of_the_readme_has_something_to_forget_whatever_the_seed(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = run(
        f"import torch\ntorch.manual_seed({seed})\n" + python_of(ROOT / "README.md"), "page", tmp_path, monkeypatch
    )
    assert names["forgetting"].baseline["old"] > 0.8
    assert names["forgetting"].history[-1]["forgetting/retention"] < 1.0


def test_quickstart_runs_and_forgets_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4
    names = run("\n".join(cells), "quickstart", tmp_path, monkeypatch)
    history = names["forgetting"].history
    assert history[0]["forgetting/retention"] == 1.0
    assert history[-1]["forgetting/retention"] < 1.0


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=name_of)
def test_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands_of(page):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            for target in (word for word in words[1:] if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        elif words[0] == "kappa-lightning":
            assert set(options(words)) <= set(options(help_of("kappa_lightning", words[1]).split())), line
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file() or (
                ROOT / words[2].replace(".", "/") / "__main__.py"
            ).is_file(), line
            for file in (word for word in words[3:] if word.endswith((".toml", ".yaml"))):
                assert (ROOT / file).is_file(), line
            if "fit" not in words:
                assert set(options(words)) <= set(options(help_of(words[2]).split())), line
        else:
            assert words[0] in ("pip", "eval"), f"{line}: nothing here knows whether it works"


def options(words: list[str]) -> list[str]:
    return [found[1] for word in words if (found := re.match(r"\[?(--[a-z][\w-]*)", word))]


@cache
def help_of(module: str, *words: str) -> str:
    """What a module prints as its help; in this process, so that the large libraries are imported once."""
    before, sys.argv = sys.argv, [module, *words, "--help"]
    try:
        with redirect_stdout(StringIO()) as text, pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    finally:
        sys.argv = before
    return text.getvalue()


def test_configuration_of_the_cli_page_is_taken_by_lightning_cli(tmp_path: Path) -> None:
    text = (DOCS / "guides" / "cli.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    file = tmp_path / "config.yaml"
    file.write_text(block, encoding="utf-8")
    cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args=["--config", str(file)])
    wanted = [entry["class_path"].rpartition(".")[2] for entry in yaml.safe_load(block)["trainer"]["callbacks"]]
    assert [name for name in (type(c).__name__ for c in cli.trainer.callbacks) if name in wanted] == wanted


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("api/*.md"))
    shown = set(re.findall(r"^::: kappa_lightning(?:\.pilot)?\.(\w+)$", text, re.MULTILINE))
    assert set(kappa_lightning.__all__) - {"__version__"} <= shown


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110
