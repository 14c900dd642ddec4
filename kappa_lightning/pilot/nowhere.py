"""A logger that keeps nothing, for modules that log and write by themselves."""

from __future__ import annotations

from tempfile import TemporaryDirectory

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
    """

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory(prefix="kappa-pilot-")

    @property
    @override
    def save_dir(self) -> str:
        return self._folder.name

    def close(self) -> None:
        """Remove the folder with what was written there."""
        self._folder.cleanup()
