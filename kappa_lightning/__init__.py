"""Fine-tune a network by condition number, and measure what it forgets: callbacks for PyTorch Lightning."""

from kappa_lightning.callbacks import ForgettingEval, KappaFreezeCallback, KappaMonitor
from kappa_lightning.lora import lora_targets
from kappa_lightning.probes import AccuracyProbe, AgreementProbe, PerplexityProbe, Probe, SimilarityProbe
from kappa_lightning.profile import KappaProfile
from kappa_lightning.spectra import Spectrum, condition_number, spectrum

__all__ = [
    "AccuracyProbe",
    "AgreementProbe",
    "ForgettingEval",
    "KappaFreezeCallback",
    "KappaMonitor",
    "KappaProfile",
    "PerplexityProbe",
    "Probe",
    "SimilarityProbe",
    "Spectrum",
    "condition_number",
    "lora_targets",
    "spectrum",
]
