"""Fine-tune a network by condition number, and measure what it forgets: callbacks for PyTorch Lightning."""

from kappa_lightning.profile import KappaProfile
from kappa_lightning.spectra import Spectrum, condition_number, spectrum
