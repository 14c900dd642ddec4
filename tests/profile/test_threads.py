"""Several matrices at a time on a CPU: the same rows, the same errors, and nothing of it left behind."""

import dataclasses
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import kappa_lightning.profile.compute as compute
import kappa_lightning.profile.threads as together
from kappa_lightning import KappaProfile, Spectrum
from kappa_lightning.processes import Processes
from kappa_lightning.profile.journal import Journal
from kappa_lightning.profile.settings import ProfileSettings
from kappa_lightning.profile.threads import Crew, decompose_threaded
from kappa_lightning.weights import find_weights

PLENTY = 1 << 40


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    """Three threads, and no matrix too small to be handed over."""
    monkeypatch.setattr(together, "LIGHT", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert threads_of_a_new_thread() == torch.get_num_threads() == 3
    torch.set_num_threads(before)


def threads_of_a_new_thread():
    """A new thread takes the number that was set last, by whichever thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.fixture
def net():
    torch.manual_seed(4)
    layers = nn.ModuleDict({f"layer{index}": nn.Linear(40 + index, 60) for index in range(6)})
    layers["experts"] = nn.ParameterDict({"up": torch.randn(5, 30, 50)})
    layers["conv"] = nn.Conv1d(8, 24, 3)
    return layers


@pytest.fixture
def seen(monkeypatch):
    """What the workers did: the shape, the thread, and how many threads it had."""
    calls, original = [], compute.spectrum

    def spy(matrix, **options):
        calls.append((tuple(matrix.shape), threading.current_thread().name, torch.get_num_threads()))
        return original(matrix, **options)

    monkeypatch.setattr(compute, "spectrum", spy)
    return calls


def weights_of(*sizes):
    return find_weights(nn.ModuleList([nn.Linear(size, size) for size in sizes]))


def names(weights):
    return [weight.name for weight in weights]


def test_each_thread_gets_a_matrix_the_expensive_ones_first():
    crew = Crew.of(weights_of(8, 9, 8, 10, 8), 3, PLENTY)
    assert (crew.workers, crew.threads, crew.serial) == (3, 1, ())
    assert names(crew.parallel) == ["3.weight", "1.weight", "0.weight", "2.weight", "4.weight"]


def test_a_matrix_that_would_hold_up_the_rest_is_for_all_threads():
    crew = Crew.of(weights_of(8, 40, 8, 8, 8), 2, PLENTY)
    assert names(crew.serial) == ["1.weight"]
    assert names(crew.parallel) == ["0.weight", "2.weight", "3.weight", "4.weight"]


def test_a_stack_of_many_matrices_holds_up_nothing():
    crew = Crew.of(find_weights(nn.ParameterDict({"up": torch.randn(8, 9, 9)})), 2, PLENTY)
    assert names(crew.parallel) == ["up"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_matrix_is_for_all_threads(count):
    crew = Crew.of(weights_of(*[8] * count), 4, PLENTY)
    assert (crew.workers, crew.threads, crew.parallel) == (1, 4, ())
    assert len(crew.serial) == count


def test_two_alike_go_side_by_side():
    assert len(Crew.of(weights_of(8, 8), 2, PLENTY).parallel) == 2


def test_small_matrices_are_not_handed_over(monkeypatch):
    monkeypatch.setattr(together, "LIGHT", 100**3)
    crew = Crew.of(weights_of(8, 120, 8, 120), 2, PLENTY)
    assert names(crew.serial) == ["0.weight", "2.weight"]
    assert names(crew.parallel) == ["1.weight", "3.weight"]


def test_memory_for_fewer_matrices_makes_fewer_workers_with_more_threads_each():
    weights = weights_of(*[64] * 8)
    one = together._bytes_in_work(weights[0])
    crews = [Crew.of(weights, 4, share * one) for share in (5, 4, 3, 2, 0)]
    assert [(crew.workers, crew.threads) for crew in crews] == [(4, 1), (3, 1), (2, 2), (1, 4), (1, 4)]
    assert [len(crew.serial) for crew in crews] == [0, 0, 0, 8, 8]


def test_one_thread_hands_nothing_over(seen):
    torch.set_num_threads(1)
    KappaProfile.from_model(nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)]), progress=False)
    assert {thread for _, thread, _ in seen} == {threading.current_thread().name}
    torch.set_num_threads(3)


def test_sharded_weights_are_read_in_the_models_order(monkeypatch):
    """All their processes read them together, and each may have other threads and memory."""
    weights = weights_of(8, 9, 10, 8, 8)
    sharded = {"1.weight", "2.weight"}
    monkeypatch.setattr(type(weights[0]), "is_sharded", property(lambda weight: weight.name in sharded))
    crew = Crew.of(weights, 3, PLENTY)
    assert names(crew.serial) == ["1.weight", "2.weight"]


def test_a_weight_that_is_too_large_for_the_memory_leaves_the_others_side_by_side():
    weights = weights_of(*[64] * 8, 128)
    crew = Crew.of(weights, 3, 4 * together._bytes_in_work(weights[0]))
    assert (crew.workers, names(crew.serial)) == (3, ["8.weight"])


def test_what_is_moved_out_does_not_count_for_what_stays():
    """The largest is for all threads; the next one would then hold up the rest as well."""
    assert names(Crew.of(weights_of(8, 8, 20, 60), 2, PLENTY).serial) == ["2.weight", "3.weight"]


def test_rows_are_those_of_numpy_in_the_models_order(net, seen):
    profile = KappaProfile.from_model(net, progress=False)
    assert {threads for _, _, threads in seen} == {1}
    assert all(thread.startswith("kappa") for _, thread, _ in seen)
    assert sorted(shape for shape, *_ in seen if shape[1:] == (30, 50)) == [(1, 30, 50)] * 5
    assert [row.name for row in profile] == names(find_weights(net))
    for row, weight in zip(profile, find_weights(net), strict=True):
        sigma = np.linalg.svd(weight.matrices().double().numpy(), compute_uv=False)
        np.testing.assert_allclose(row.kappas or [row.kappa], sigma[:, 0] / sigma[:, -1], rtol=1e-9, err_msg=row.name)
        np.testing.assert_allclose(row.log_volume, np.log(sigma).sum(), rtol=1e-9, err_msg=row.name)
        np.testing.assert_allclose(row.frobenius_norm, np.linalg.norm(sigma), rtol=1e-9, err_msg=row.name)
    profile.check(net)


def test_number_of_workers_changes_no_bit(net):
    """As long as each has one thread: a checkpoint's profile is the same on a machine with more cores."""
    profiles = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        profiles.append(KappaProfile.from_model(net, progress=False))
    assert profiles[0] == profiles[1] == profiles[2]


def test_small_experts_are_handed_over_several_at_a_time(monkeypatch, seen):
    stack = nn.ParameterDict({"up": torch.randn(10, 20, 20)})
    monkeypatch.setattr(together, "LIGHT", 3 * 20**3)
    KappaProfile.from_model(stack, progress=False)
    assert sorted(shape[0] for shape, *_ in seen) == [1, 3, 3, 3]


def test_weight_that_is_not_finite_is_named(net):
    with torch.no_grad():
        net["layer3"].weight[3, 3] = float("nan")
    precision = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ValueError, match=r"^layer3\.weight\b.*NaN or infinite"):
        KappaProfile.from_model(net, progress=False)
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


def test_lowered_precision_is_kept_from_the_workers_and_put_back(net, monkeypatch):
    inside, original = [], compute.spectrum

    def spy(matrix, **options):
        inside.append(torch.backends.mkldnn.matmul.fp32_precision)
        return original(matrix, **options)

    monkeypatch.setattr(compute, "spectrum", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        KappaProfile.from_model(net, progress=False)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(inside) == {"ieee"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_pass_goes_on_with_only_the_rest(net, tmp_path, monkeypatch, error):
    out, original, calls = tmp_path / "kappa.json", compute.spectrum, []

    def failing(matrix, **options):
        calls.append(tuple(matrix.shape))
        if len(calls) == 9:
            raise error
        return original(matrix, **options)

    with monkeypatch.context() as context:
        context.setattr(compute, "spectrum", failing)
        with pytest.raises(error):
            KappaProfile.from_model(net, progress=False, save_to=out)
    kept = len((tmp_path / "kappa.json.partial").read_text().splitlines()) - 1
    assert kept > 0
    calls.clear()
    with monkeypatch.context() as context:
        context.setattr(compute, "spectrum", lambda matrix, **o: calls.append(len(matrix)) or original(matrix, **o))
        profile = KappaProfile.from_model(net, progress=False, save_to=out)
    known = 8 - kept
    assert sum(calls) in (known, known + 4)  # with the five experts, or without
    assert profile == KappaProfile.from_model(net, progress=False)


@pytest.mark.slow
def test_no_more_weights_are_in_memory_than_there_are_workers_and_one(monkeypatch):
    alive, most = weakref.WeakSet(), 0
    weights = weights_of(*[8] * 12)

    def read(weight):
        nonlocal most
        tensor = torch.randn(weight.shape)
        alive.add(tensor)
        gc.collect()
        most = max(most, len(alive))
        return tensor

    def slow(matrix, **options):
        time.sleep(0.002)
        return Spectrum(*[torch.ones(len(matrix))] * 6)

    monkeypatch.setattr(compute, "spectrum", slow)
    fresh = [dataclasses.replace(weight, read=partial(read, weight)) for weight in weights]
    assert len(list(compute.compute_rows(fresh))) == 12
    assert 3 < most <= 4


def test_known_rows_come_when_they_are_met(net, tmp_path):
    """Not at the end, when the progress bar has nothing left to show."""
    weights = find_weights(net)
    with Journal(tmp_path / "partial", ProfileSettings()) as journal:
        for row in compute.compute_rows(weights, journal=journal):
            last = row.name
    with torch.no_grad():
        dict(net.named_parameters())[last].mul_(2)
    rows = compute.compute_rows(weights, journal=Journal(tmp_path / "partial", ProfileSettings()))
    parallel = [weight.name for weight in Crew.of(weights, 3, PLENTY).parallel]
    parallel.remove(last)
    assert [next(rows).name for _ in parallel] == parallel
    assert [row.name for row in rows] == [last]


def test_a_large_weight_does_not_keep_the_others_waiting():
    """Rows come as they are finished, whatever was begun first."""
    weights = weights_of(9, 8, 8, 8)
    crew = Crew.of(weights, 2, PLENTY)
    others_done = threading.Event()

    def decompose(matrices):
        if matrices.shape[-1] == 9:
            assert others_done.wait(20)
        return Spectrum(*[torch.ones(len(matrices))] * 6)

    order = []
    for done in decompose_threaded(crew, lambda weight: weight.read().detach(), decompose):
        order.append(done.weight.name)
        if len(order) == 3:
            others_done.set()
    assert order == ["1.weight", "2.weight", "3.weight", "0.weight"]


def test_an_error_of_who_watches_ends_the_work(net):
    def watch(weights, rows):
        yield next(iter(rows))
        raise RuntimeError("the bar broke")

    with pytest.raises(RuntimeError, match="the bar broke") as caught:
        KappaProfile.from_weights(find_weights(net), watch=watch)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kappa")], caught


def test_a_pass_that_is_given_up_leaves_no_thread(net):
    weights = find_weights(net)
    rows = compute.compute_rows(weights)
    next(rows)
    rows.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kappa")]


def together_for_once(monkeypatch, workers):
    """As many workers as there should be: each waits at its first matrix until all of them have one."""
    original, met, begun = compute.spectrum, threading.Barrier(workers), set()

    def meet(matrix, **options):
        if (name := threading.current_thread().name) not in begun:
            begun.add(name)
            met.wait(timeout=60)
        return original(matrix, **options)

    monkeypatch.setattr(compute, "spectrum", meet)


def test_memory_budget_sets_how_many_are_worked_on_at_a_time(monkeypatch, seen):
    large = nn.ModuleList([nn.Linear(200, 200, bias=False) for _ in range(6)])
    one = together._bytes_in_work(find_weights(large)[0])
    profiles = []
    for budget, workers, threads in ((4 * one, 3, 1), (3 * one, 2, 1), (one, 1, 3)):
        seen.clear()
        with monkeypatch.context() as patch:
            together_for_once(patch, workers)
            profiles.append(KappaProfile.from_model(large, progress=False, memory_budget=budget))
        # Two workers share three threads, so that each has one; one matrix at a time has all of them.
        assert {used for _, _, used in seen} == {threads}
        assert len({thread for _, thread, _ in seen}) == workers
    kappas = [[row.kappa for row in profile] for profile in profiles]
    np.testing.assert_allclose(kappas, np.broadcast_to(kappas[0], (3, 6)), rtol=1e-9)


def test_processes_of_one_machine_share_the_quarter(monkeypatch):
    budgets = []
    original = Crew.of
    monkeypatch.setattr(Crew, "of", lambda *given: budgets.append(given[2]) or original(*given))
    monkeypatch.setattr(compute, "free_memory", lambda device: 1 << 30)
    weights = weights_of(40, 40)
    for neighbors in (1, 4):
        list(compute.compute_rows(weights, neighbors=neighbors))
    list(compute.compute_rows(weights, ProfileSettings(memory_budget=12345), neighbors=4))
    assert budgets == [1 << 28, 1 << 26, 12345]


class Neighbors(Processes):
    """Two processes on one machine, of which the other has nothing to say."""

    def gather(self, value):
        return [value, value]

    def broadcast(self, value):
        return value


def test_a_profile_counts_the_processes_of_its_machine(monkeypatch):
    budgets = []
    original = Crew.of
    monkeypatch.setattr(Crew, "of", lambda *given: budgets.append(given[2]) or original(*given))
    monkeypatch.setattr(compute, "free_memory", lambda device: 1 << 30)
    # The other process' share is missing from what is gathered, so only the first is left to look at.
    with pytest.raises(KeyError):
        KappaProfile.from_weights(weights_of(40, 41), device="cpu", processes=Neighbors(0, 2))
    assert budgets == [1 << 27]


@pytest.mark.parametrize("budget", [0, -1])
def test_memory_budget_that_is_none_is_refused_before_a_file_is_written(net, budget, tmp_path):
    with pytest.raises(ValueError, match=f"memory_budget must be a positive number of bytes, got {budget}"):
        KappaProfile.from_model(net, progress=False, memory_budget=budget, save_to=tmp_path / "kappa.json")
    assert list(tmp_path.iterdir()) == []
