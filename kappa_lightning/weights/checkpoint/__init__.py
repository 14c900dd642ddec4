"""The weight matrices of a checkpoint, read from disk one tensor at a time.

``files`` finds the files and ``safetensors_file`` and ``pickle_file`` read their tensors, each a ``Stored``; what the
layers are that these belong to says ``configured``, by the config beside them, or else ``assumed``, by their names.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kappa_lightning.weights.checkpoint.assumed import assumed_weights
from kappa_lightning.weights.checkpoint.config import NoModelError
from kappa_lightning.weights.checkpoint.configured import configured_weights
from kappa_lightning.weights.checkpoint.files import find_source, read_files
from kappa_lightning.weights.checkpoint.mxfp4 import with_mxfp4_dequantized
from kappa_lightning.weights.checkpoint.remote import is_remote, read_remote
from kappa_lightning.weights.checkpoint.stored import Stored
from kappa_lightning.weights.weight import Weight

__all__ = ["checkpoint_weights"]


def checkpoint_weights(path: str | os.PathLike[str]) -> list[Weight]:
    """The matrices of a checkpoint; only names and shapes are read until a weight is asked for.

    Where a ``config.json`` of transformers or diffusers lies beside the checkpoint, the weights are those of the model
    that the library makes of it, under its names, with its layers: built without values, and with no code of the
    checkpoint's. Otherwise names and shapes must tell, and a warning says what was assumed: a tensor of three
    dimensions is a stack of matrices, such as fused experts, unless its name says that it belongs to a convolution, and
    the outputs of a convolution come first, which they do not in a transposed one.

    Args:
        path: a ``.safetensors`` file; a file of ``torch.save`` with a state dict, such as a Lightning ``.ckpt``, read
            without unpickling code; a folder with one of these under a name that transformers, diffusers or PEFT give
            it, or with an index and its shards; the id of a hub model that is in the local cache; or a URL that fsspec
            reads (``hf://org/model``, ``s3://…``, ``https://…``) of a ``.safetensors`` file or such a folder, of which
            each tensor is downloaded when it is decomposed, and none is kept.

    Raises:
        FileNotFoundError: if there is no such file and no such model in the cache, or a shard is missing.
        ImportError: if the library for a URL's protocol is not installed.
        ValueError: if a file is corrupt, of an unknown kind, or holds no matrix or several state dicts, or a shard
            lacks a tensor that the index places there.
    """
    if is_remote(str(path)):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            weights = _weights(str(path), folder, with_mxfp4_dequantized(read_remote(str(path), folder)))
    else:
        source = find_source(path)
        weights = _weights(str(source), source if source.is_dir() else source.parent, read_files(source))
    if not weights:
        raise ValueError(f"{path} holds no weight matrix")
    return weights


def _weights(source: str, folder: Path, tensors: Mapping[str, Stored]) -> list[Weight]:
    try:
        return configured_weights(folder, tensors)
    except NoModelError as reason:
        return assumed_weights(source, tensors, str(reason))
