"""Shows a notebook with its outputs as a page: ``quickstart.ipynb`` becomes ``quickstart.md``."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page, and its pictures, for each notebook."""
    for notebook in sorted(Path(config.docs_dir).glob("*.ipynb")):
        text, pictures = page(json.loads(notebook.read_text(encoding="utf-8")), notebook.stem)
        files.append(File.generated(config, f"{notebook.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, name, content=content))
    return files


def page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"images/{stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell above shows]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).strip("\n"):
                parts.append(f"```text\n{_ESCAPES.sub('', text)}\n```")
    return "\n\n".join(parts) + "\n", pictures
