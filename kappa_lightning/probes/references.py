"""What a probe recorded, in memory or in a folder, within a number of bytes."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from kappa_lightning.files import replacing
from kappa_lightning.fingerprint import fingerprint

Reference = dict[str, Tensor]

FORMAT = "kappa-lightning reference distribution"


class References:
    """Tensors under keys, never more than a number of bytes.

    Args:
        max_bytes: what all of them may take.
        directory: where they are kept, one file a key; in memory if ``None``.
    """

    def __init__(self, max_bytes: int, directory: str | os.PathLike[str] | None) -> None:
        self.max_bytes = max_bytes
        self.directory = None if directory is None else Path(directory)
        self._kept: dict[str, Reference] = {}
        self._sizes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def num_bytes(self) -> int:
        """What all of them take."""
        return sum(self._sizes.values())

    def clear(self) -> None:
        """Forget all; files stay, for they may be another run's."""
        self._kept, self._sizes = {}, {}

    def add(self, key: str, reference: Reference) -> None:
        """Keep a reference.

        Raises:
            ValueError: if it does not fit; nothing is kept then.
        """
        size = self._room_for(key, reference)
        if self.directory is None:
            self._kept[key] = reference
        else:
            self._write(self._file(key), reference)
        self._sizes[key] = size

    def adopt(self, key: str, reference: Reference) -> None:
        """Count as one's own what :meth:`get` found.

        Raises:
            ValueError: as in :meth:`add`.
        """
        self._sizes[key] = self._room_for(key, reference)

    def get(self, key: str) -> Reference | None:
        """A reference; ``None`` if there is none of that key.

        Raises:
            ValueError: if its file is damaged, or something else.
        """
        if self.directory is None:
            return self._kept.get(key)
        file = self._file(key)
        return self._read(file) if os.path.lexists(file) else None

    def to_dict(self) -> dict[str, Reference]:
        """The references that are kept in memory, by their keys."""
        return dict(self._kept)

    def keys(self) -> list[str]:
        """The keys of all, wherever they are kept."""
        return list(self._sizes)

    def _room_for(self, key: str, reference: Reference) -> int:
        size = sum(tensor.numel() * tensor.element_size() for tensor in reference.values())
        used = sum(self._sizes.values()) + size - self._sizes.get(key, 0)
        if used > self.max_bytes:
            raise ValueError(
                f"the reference distributions of {len(self._sizes) + 1} batches take {used:,} bytes, more than "
                f"max_bytes={self.max_bytes:,}: allow more, keep only the likeliest tokens with top_k=…, or give "
                "fewer or shorter batches"
            )
        return size

    def _file(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{key}.safetensors"

    @staticmethod
    def _write(file: Path, reference: Reference) -> None:
        from safetensors.torch import save_file

        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in reference.items()}
        marks = {f"mark.{name}": fingerprint(tensor) for name, tensor in tensors.items()}
        with replacing(file) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, **marks})

    @staticmethod
    def _read(file: Path) -> Reference:
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            raise ValueError(f"{file} is no file: a reference distribution is expected there; give an empty directory")
        try:
            with safe_open(file, framework="pt") as opened:
                marks = opened.metadata() or {}
                reference = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise ValueError(
                f"{file} is no safetensors file, or a truncated one ({error}): delete it, and record on the "
                "pretrained weights again"
            ) from error
        if set(reference) not in ({"log_p"}, {"log_p", "tokens", "log_rest"}):
            raise ValueError(
                f"{file} holds {sorted(reference)} and not a reference distribution (log_p): give a directory of "
                "its own"
            )
        # Files of version 0.1.0 have no marks.
        for name, tensor in reference.items():
            if marks.get("format") == FORMAT and fingerprint(tensor) != marks.get(f"mark.{name}"):
                raise ValueError(
                    f"{file} is damaged: the content of {name} has changed since it was written; delete it, and "
                    "record on the pretrained weights again"
                )
        return reference
