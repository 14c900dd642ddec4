"""Probes: what the pretrained model could do, as a dataloader, a metric and a step between them."""

from kappa_lightning.probes.accuracy import AccuracyProbe
from kappa_lightning.probes.agreement import AgreementProbe
from kappa_lightning.probes.perplexity import PerplexityProbe, next_token_labels
from kappa_lightning.probes.probe import Probe, Step, known_length
from kappa_lightning.probes.similarity import SimilarityProbe

__all__ = [
    "AccuracyProbe",
    "AgreementProbe",
    "PerplexityProbe",
    "Probe",
    "SimilarityProbe",
    "Step",
    "known_length",
    "next_token_labels",
]
