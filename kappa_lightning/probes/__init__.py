"""Probes: what the pretrained model could do, as a dataloader, a metric and a step between them."""

from kappa_lightning.probes.accuracy import AccuracyProbe
from kappa_lightning.probes.agreement import AgreementProbe
from kappa_lightning.probes.content import content_key
from kappa_lightning.probes.cosine import SimilarityProbe
from kappa_lightning.probes.generated import generate_text, load_text, save_text
from kappa_lightning.probes.generation import GenerationProbe
from kappa_lightning.probes.inputs import GeneratedText, ReferenceInputs, TaskInputs
from kappa_lightning.probes.lm_eval import LMEvalProbe
from kappa_lightning.probes.output import Bernoulli, Categorical, Gaussian, Joint, OutputDistribution, similarity
from kappa_lightning.probes.perplexity import PerplexityProbe, next_token_labels
from kappa_lightning.probes.probe import Probe, Step, known_length
from kappa_lightning.probes.resolving import resolve_reference
from kappa_lightning.probes.synthesized import SynthesizedInputs

__all__ = [
    "AccuracyProbe",
    "AgreementProbe",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "GeneratedText",
    "GenerationProbe",
    "Joint",
    "LMEvalProbe",
    "OutputDistribution",
    "PerplexityProbe",
    "Probe",
    "ReferenceInputs",
    "SimilarityProbe",
    "Step",
    "SynthesizedInputs",
    "TaskInputs",
    "content_key",
    "generate_text",
    "known_length",
    "load_text",
    "next_token_labels",
    "resolve_reference",
    "save_text",
    "similarity",
]
