"""Fine-tune a network by condition number, and measure what it forgets: callbacks for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING

from kappa_lightning.profile import KappaProfile
from kappa_lightning.spectra import Spectrum, condition_number, spectrum
from kappa_lightning.version import __version__

if TYPE_CHECKING:
    from kappa_lightning import pilot
    from kappa_lightning.callbacks import (
        ForgettingEval,
        KappaFreezeCallback,
        KappaMonitor,
        PretrainedAnchor,
        SensitivityFreezeCallback,
        TrainedOnlyCheckpoint,
        WalkBack,
        load_trained,
    )
    from kappa_lightning.evaluation import evaluate_probe
    from kappa_lightning.lora import lora_targets
    from kappa_lightning.probes import (
        AccuracyProbe,
        AgreementProbe,
        GenerationProbe,
        LMEvalProbe,
        PerplexityProbe,
        Probe,
        SimilarityProbe,
    )
    from kappa_lightning.sensitivity import SensitivityProfile
else:
    # Lightning and torchmetrics take seconds to import, and the command and the condition numbers do without them.
    _ROOMS = {
        "kappa_lightning.callbacks": (
            "ForgettingEval",
            "KappaFreezeCallback",
            "KappaMonitor",
            "PretrainedAnchor",
            "SensitivityFreezeCallback",
            "TrainedOnlyCheckpoint",
            "WalkBack",
            "load_trained",
        ),
        "kappa_lightning.evaluation": ("evaluate_probe",),
        "kappa_lightning.lora": ("lora_targets",),
        "kappa_lightning.pilot": ("pilot",),
        "kappa_lightning.probes": (
            "AccuracyProbe",
            "AgreementProbe",
            "GenerationProbe",
            "LMEvalProbe",
            "PerplexityProbe",
            "Probe",
            "SimilarityProbe",
        ),
        "kappa_lightning.sensitivity": ("SensitivityProfile",),
    }

    def __getattr__(name):
        for room, names in _ROOMS.items():
            if name in names:
                module = import_module(room)
                # A room that has the name of its one function can be called, and stays a module that can be imported.
                value = module if room == f"{__name__}.{name}" else getattr(module, name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "AccuracyProbe",
    "AgreementProbe",
    "ForgettingEval",
    "GenerationProbe",
    "KappaFreezeCallback",
    "KappaMonitor",
    "KappaProfile",
    "LMEvalProbe",
    "PerplexityProbe",
    "PretrainedAnchor",
    "Probe",
    "SensitivityFreezeCallback",
    "SensitivityProfile",
    "SimilarityProbe",
    "Spectrum",
    "TrainedOnlyCheckpoint",
    "WalkBack",
    "__version__",
    "condition_number",
    "evaluate_probe",
    "load_trained",
    "lora_targets",
    "pilot",
    "spectrum",
]
