"""A logger that keeps nothing, for modules that log and write by themselves."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override


class Nowhere(DummyLogger):
    """Takes whatever a module gives it; its folder, which is ``trainer.log_dir``, ends with it.

    Example:
        >>> from pathlib import Path
        >>> logger = Nowhere()
        >>> logger.experiment.add_scalar("loss", 1.0, 0)
        >>> folder = Path(logger.save_dir)
        >>> existed = folder.is_dir()
        >>> logger.close()
        >>> existed, folder.exists()
        (True, False)

        A copy, such as another process gets, has the same folder and leaves it alone.

        >>> import copy
        >>> logger = Nowhere()
        >>> other = copy.deepcopy(logger)
        >>> other.close()
        >>> other.save_dir == logger.save_dir, Path(logger.save_dir).is_dir()
        (True, True)
        >>> logger.close()
    """

    def __init__(self) -> None:
        super().__init__()
        self._folder: TemporaryDirectory[str] | None = TemporaryDirectory(prefix="kappa-pilot-")
        self._path = self._folder.name

    @property
    @override
    def save_dir(self) -> str:
        return self._path

    def close(self) -> None:
        """Remove the folder with what was written there."""
        if self._folder is not None:
            self._folder.cleanup()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folder": None}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # The base answers these as well, and so would not be copied.
            raise AttributeError(name)
        return super().__getattr__(name)
