"""Who is measured: the package, PEFT's selector, the reference implementation's way, and the bare factorizations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.spectra.weights import model_of
from kappa_lightning import KappaProfile
from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.spectra import spectrum


def run_profile(tensors: Sequence[Tensor]) -> list[float]:
    """The package's own pass over the model: condition numbers, log-volumes, norms and fingerprints."""
    return [row.kappa for row in KappaProfile.from_model(model_of(tensors), progress=False)]


def run_peft(tensors: Sequence[Tensor]) -> list[float]:
    """PEFT's own selector, on the same model."""
    from peft.helpers import KappaTuneSelector

    selector = KappaTuneSelector(model_of(tensors), show_progress=False)
    selector.get_best_targets()
    selector.get_best_target_parameters()
    return [*(selector._condition_numbers or {}).values(), *(selector._parameter_condition_numbers or {}).values()]


def run_spectrum(tensors: Sequence[Tensor]) -> list[float]:
    """The solver alone, one tensor after the other."""
    return [kappa for tensor in tensors for kappa in spectrum(tensor).kappa.flatten().tolist()]


def run_fingerprint(tensors: Sequence[Tensor]) -> list[float]:
    """The fingerprints alone."""
    for tensor in tensors:
        fingerprint(tensor)
    return []


def run_svd(tensors: Sequence[Tensor]) -> list[float]:
    """The way of the reference implementation: all of U, S and V of the matrix as it lies."""
    values = [torch.linalg.svd(tensor, full_matrices=False).S for tensor in tensors]
    return [float(s[0] / s[-1]) for stack in values for s in stack.reshape(-1, stack.shape[-1])]


def run_floor(tensors: Sequence[Tensor]) -> list[float]:
    """The bare float32 factorization: LU of a square matrix, R of a QR otherwise."""
    for tensor in tensors:
        if tensor.shape[-2] == tensor.shape[-1]:
            torch.linalg.lu_factor(tensor.mT)
        else:
            run_qr([tensor])
    return []


def run_qr(tensors: Sequence[Tensor]) -> list[float]:
    """The bare float32 QR, of square matrices as well."""
    for tensor in tensors:
        torch.linalg.qr(tensor if tensor.shape[-2] >= tensor.shape[-1] else tensor.mT, mode="r")
    return []


def run_qr64(tensors: Sequence[Tensor]) -> list[float]:
    """The bare float64 QR, of square matrices as well."""
    return run_qr([tensor.double() for tensor in tensors])


def run_floor64(tensors: Sequence[Tensor]) -> list[float]:
    """The same in float64, the precision in which a κ of 1e4 and more is known to 1e-3."""
    return run_floor([tensor.double() for tensor in tensors])


Competitor = Callable[[Sequence[Tensor]], list[float]]

COMPETITORS: dict[str, Competitor] = {
    "KappaProfile": run_profile,
    "PEFT selector": run_peft,
    "torch.linalg.svd": run_svd,
    "bare LU/QR float32": run_floor,
    "bare QR float32": run_qr,
    "bare LU/QR float64": run_floor64,
    "bare QR float64": run_qr64,
}
