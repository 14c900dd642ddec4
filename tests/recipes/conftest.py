import json

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of six images with their captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number in range(6):
        Image.new("RGB", (40, 30), ("red", "blue")[number % 2]).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"a {('red', 'blue')[number % 2]} cat sits ."}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)
