from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kappa_lightning.profile.compute as compute
from kappa_lightning import KappaProfile
from kappa_lightning.profile.batches import batches_of_one_shape, working_bytes_of
from kappa_lightning.profile.compute import compute_rows
from kappa_lightning.weights import find_weights

CUDA = torch.device("cuda")


def model():
    """Layers of three shapes in turn, a Conv whose matrix has one of them, a stack, and another precision."""
    torch.manual_seed(4)
    net = nn.ModuleDict()
    for index in range(3):
        net[f"square{index}"] = nn.Linear(6, 6)
        net[f"wide{index}"] = nn.Linear(12, 4)
    net["conv"] = nn.Conv1d(4, 4, 3)  # 4 × 12, as the wide ones
    net["experts"] = nn.ParameterDict({"up": torch.randn(5, 6, 6)})  # five more of 6 × 6
    net["low"] = nn.Linear(6, 6).to(torch.bfloat16)
    net["last"] = nn.Linear(6, 6)
    return net


def names_of(batches):
    return [[weight.name for weight in batch] for batch in batches]


def bytes_of(batch):
    return sum(map(working_bytes_of, batch))


@pytest.fixture
def memory(monkeypatch):
    """Sets what a device seems to have free."""
    return lambda count: monkeypatch.setattr(compute, "free_memory", lambda device: count)


@pytest.fixture
def no_gpu(monkeypatch, memory):
    """Takes the way of a GPU, with the arithmetic on the CPU and plenty of memory."""

    def loaded(batches, device):
        assert device == CUDA
        for batch in batches:
            yield batch, [weight.read() for weight in batch]

    monkeypatch.setattr(compute, "loaded", loaded)
    memory(1 << 40)


def test_on_the_cpu_tensors_go_through_one_after_the_other_in_the_models_order(decomposed):
    net = model()
    KappaProfile.from_model(net, progress=False, device="cpu")
    assert [shape for _, shape in decomposed] == [weight.stack_shape for weight in find_weights(net)]


def test_on_a_gpu_matrices_of_one_shape_and_precision_go_together():
    batches = batches_of_one_shape(find_weights(model()), 1 << 40, working_bytes_of)
    assert names_of(batches) == [
        ["square0.weight", "square1.weight", "square2.weight", "experts.up", "last.weight"],
        ["wide0.weight", "wide1.weight", "wide2.weight", "conv.weight"],
        ["low.weight"],
    ]


def test_transposes_of_each_other_do_not_go_together():
    net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)])
    assert names_of(batches_of_one_shape(find_weights(net), 1 << 40, working_bytes_of)) == [["0.weight"], ["1.weight"]]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 9, 10])
def test_batch_fills_the_budget_and_no_more(layers):
    weights = find_weights(nn.ModuleList([nn.Linear(8, 8) for _ in range(10)]))
    one = bytes_of(weights[:1])
    for budget in (layers * one, layers * one + one - 1):
        batches = batches_of_one_shape(weights, budget, working_bytes_of)
        assert max(map(bytes_of, batches)) <= budget
        sizes = [len(batch) for batch in batches]
        assert sizes == [layers] * (10 // layers) + [10 % layers] * (10 % layers > 0)


@pytest.mark.parametrize(("given", "wanted"), [(None, 1 << 20), (1 << 10, 1 << 9), (1, 1)])
def test_a_gpu_holds_as_much_for_the_work_as_for_the_tensors(no_gpu, memory, monkeypatch, given, wanted):
    memory(1 << 22)
    budgets = []
    batches, spectrum = compute.batches_of_one_shape, compute.spectrum
    monkeypatch.setattr(compute, "batches_of_one_shape", lambda *these: budgets.append(these[1]) or batches(*these))
    monkeypatch.setattr(
        compute,
        "spectrum",
        lambda view, **options: budgets.append(options["memory_budget"]) or spectrum(view, **options),
    )
    KappaProfile.from_model(nn.Linear(3, 4), progress=False, device="cuda", memory_budget=given)
    assert budgets == [wanted, wanted]


def test_tensor_that_is_too_large_goes_alone_and_stops_nothing():
    weights = find_weights(model())
    assert batches_of_one_shape(weights, 1, working_bytes_of) == [[weight] for weight in weights]


@pytest.mark.parametrize("budget", [1, 1_000, 5_000, 25_000, 1 << 40])
def test_every_tensor_is_in_exactly_one_batch_whatever_the_memory(budget):
    weights = find_weights(model())
    batches = batches_of_one_shape(weights, budget, working_bytes_of)
    assert sorted(name for batch in names_of(batches) for name in batch) == sorted(weight.name for weight in weights)
    assert all(len(batch) == 1 or bytes_of(batch) <= budget for batch in batches)


def test_no_tensor_gives_no_batch():
    assert batches_of_one_shape([], 1 << 40, working_bytes_of) == []


def test_profile_by_batches_has_the_models_order(no_gpu):
    net = model()
    profile = KappaProfile.from_model(net, progress=False, device="cuda")
    assert [row.name for row in profile] == [weight.name for weight in find_weights(net)]


@pytest.mark.parametrize("solver", ["auto", "svd"])
def test_batches_give_each_tensor_its_own_numbers(no_gpu, decomposed, solver):
    net = model()
    batched = KappaProfile.from_model(net, progress=False, device="cuda", solver=solver, rtol=1e-6)
    assert sorted(shape for _, shape in decomposed) == [(1, 6, 6), (4, 4, 12), (9, 6, 6)]
    for row, weight in zip(batched, find_weights(net), strict=True):
        matrices = weight.matrices().double().numpy()
        sigma = np.linalg.svd(matrices, compute_uv=False)
        kappas = sigma[:, 0] / sigma[:, -1]
        np.testing.assert_allclose(row.kappa, kappas.mean(), rtol=1e-6, err_msg=row.name)
        np.testing.assert_allclose(row.sigma_max, sigma.max(), rtol=1e-6, err_msg=row.name)
        np.testing.assert_allclose(row.sigma_min, sigma.min(), rtol=1e-6, err_msg=row.name)
        np.testing.assert_allclose(row.log_volume, np.log(sigma).sum(), atol=1e-5, err_msg=row.name)
        np.testing.assert_allclose(row.frobenius_norm, np.linalg.norm(matrices), rtol=1e-6, err_msg=row.name)
        assert row.shape == tuple(dict(net.named_parameters())[row.name].shape)
        assert (row.kappas is None) == (row.name != "experts.up")
    np.testing.assert_allclose(batched["experts.up"].kappas, _kappas(net["experts"]["up"]), rtol=1e-6)
    batched.check(net)


def _kappas(stack):
    sigma = np.linalg.svd(stack.detach().double().numpy(), compute_uv=False)
    return sigma[:, 0] / sigma[:, -1]


def test_entry_that_is_not_finite_is_found_within_its_batch(no_gpu):
    net = model()
    with torch.no_grad():
        net["wide2"].weight[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"^wide2\.weight\b.*NaN or infinite"):
        KappaProfile.from_model(net, progress=False, device="cuda")


def test_one_degenerate_matrix_leaves_the_rest_of_its_batch_alone(no_gpu):
    net = model()
    before = KappaProfile.from_model(net, progress=False, device="cuda")
    with torch.no_grad():
        net["square1"].weight.zero_()
    after = KappaProfile.from_model(net, progress=False, device="cuda")
    assert after["square1.weight"].kappa == float("inf")
    assert after["square1.weight"].sigma_max == 0.0
    for row in before:
        if row.name != "square1.weight":
            assert after[row.name].kappa == pytest.approx(row.kappa, rel=2e-3)


def test_interrupted_pass_decomposes_only_the_rest_of_each_batch(no_gpu, memory, tmp_path, monkeypatch, decomposed):
    net, out = model(), tmp_path / "kappa.json"
    memory(4 * bytes_of(find_weights(net["square0"])))  # one 6 × 6 at a time
    original, calls = compute.spectrum, []

    def failing(matrix, **options):
        calls.append(matrix.shape)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(matrix, **options)

    with monkeypatch.context() as context:
        context.setattr(compute, "spectrum", failing)
        with pytest.raises(KeyboardInterrupt):
            KappaProfile.from_model(net, progress=False, device="cuda", save_to=out)
    memory(1 << 40)
    done = sum(count for _, (count, *_) in decomposed)
    decomposed.clear()
    profile = KappaProfile.from_model(net, progress=False, device="cuda", save_to=out)
    assert sum(count for _, (count, *_) in decomposed) == 14 - done
    assert [row.name for row in profile] == [weight.name for weight in find_weights(net)]
    profile.check(net)


def test_progress_sees_each_tensor_once_although_they_come_by_batches(no_gpu, capsys):
    net = model()
    KappaProfile.from_model(net, device="cuda")
    bar = capsys.readouterr().err
    assert "Condition numbers" in bar
    assert "0%" in bar


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_profile_of_the_cpu_tensor_by_tensor(memory):
    net = model()
    on_cpu = KappaProfile.from_model(net, progress=False, device="cpu")
    for free in (1, 1 << 40):
        memory(free)
        on_gpu = KappaProfile.from_model(net, progress=False, device="cuda")
        assert [(row.name, row.fingerprint) for row in on_gpu] == [(row.name, row.fingerprint) for row in on_cpu]
        for row in on_gpu:
            assert row.kappa == pytest.approx(on_cpu[row.name].kappa, rel=2e-3)


def test_small_tensors_of_one_shape_are_decomposed_together_and_get_the_numbers_they_have_alone(decomposed):
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(8, 8) if index % 2 else nn.Linear(5, 6) for index in range(300)])
    profile = KappaProfile.from_model(net, progress=False)
    assert sum(count for _, (count, *_) in decomposed) == 300
    assert len(decomposed) <= 6
    assert [row.name for row in profile] == [weight.name for weight in find_weights(net)]
    for index in (0, 1, 150, 299):
        alone = KappaProfile.from_model(net, progress=False, include=[f"{index}.*"])
        assert list(alone) == [profile[f"{index}.weight"]]


def test_interrupted_pass_over_small_tensors_loses_one_batch_at_most(tmp_path, monkeypatch):
    net, calls = nn.ModuleList([nn.Linear(8, 8) for _ in range(300)]), []
    original = compute.spectrum

    def failing(matrix, **options):
        calls.append(len(matrix))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(matrix, **options)

    monkeypatch.setattr(compute, "spectrum", failing)
    with pytest.raises(KeyboardInterrupt):
        KappaProfile.from_model(net, progress=False, save_to=tmp_path / "kappa.json")
    done = calls[0]
    assert 100 < done < 200
    calls[:] = [0, 0]
    KappaProfile.from_model(net, progress=False, save_to=tmp_path / "kappa.json")
    assert sum(calls) == 300 - done


def test_no_weights_on_a_gpu_give_no_rows() -> None:
    assert list(compute_rows([], device="cuda")) == []
