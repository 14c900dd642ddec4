import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax, rel_entr, softmax
from torch import nn

from kappa_lightning import AgreementProbe
from kappa_lightning.probes.distributions import describe, divergence


class Table(nn.Module):
    """A bigram model: the logits of the token after t are row t."""

    def __init__(self, vocabulary=9, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = nn.Parameter(3 * torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, input_ids, attention_mask=None):
        return self.rows[input_ids]


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(9, (2, 6), generator=generator)} for _ in range(count)]


def measure(probe, module, order=None):
    probe.metric.reset()
    with torch.no_grad():
        for batch in order or probe.dataloader:
            probe.update(module, batch)
    return probe.compute()


def recorded(probe, module):
    probe.begin_baseline()
    assert measure(probe, module) == 1.0
    return probe


def exact_agreement(before, after, ids):
    """exp(−mean KL) with SciPy in float64, token by token."""
    p, q = before.rows.detach().double().numpy(), after.rows.detach().double().numpy()
    nats = [rel_entr(softmax(p[t]), softmax(q[t])).sum() for t in ids]
    return math.exp(-np.mean(nats))


def test_agreement_is_that_of_scipy():
    before, after = Table(seed=1), Table(seed=2)
    probe = recorded(AgreementProbe(batches()), before)
    ids = [int(t) for batch in batches() for t in batch["input_ids"].flatten()]
    expected = exact_agreement(before, after, ids)
    assert 0.001 < expected < 0.9
    assert measure(probe, after) == pytest.approx(expected, rel=1e-5)


def test_divergence_is_from_the_pretrained_model_and_not_the_other_way_round():
    before, after = Table(seed=1), Table(seed=2)
    ids = [int(t) for batch in batches() for t in batch["input_ids"].flatten()]
    assert exact_agreement(before, after, ids) != pytest.approx(exact_agreement(after, before, ids), rel=1e-2)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_likeliest_tokens_give_the_divergence_in_which_all_others_are_one(top_k):
    p, q = 2 * torch.randn(40, 9), 2 * torch.randn(40, 9)
    expected = []
    for row_p, row_q in zip(softmax(p.double().numpy(), -1), softmax(q.double().numpy(), -1), strict=True):
        top = np.argsort(row_p)[::-1][:top_k]
        merged_p, merged_q = (np.append(row[top], np.delete(row, top).sum()) for row in (row_p, row_q))
        expected.append(rel_entr(merged_p, merged_q).sum())
    found = divergence(describe(p, top_k), q)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert (found <= divergence(describe(p), q) + 1e-5).all()


def test_as_many_tokens_as_the_vocabulary_has_are_exact():
    p, q = torch.randn(7, 9), torch.randn(7, 9)
    assert torch.equal(divergence(describe(p, 9), q), divergence(describe(p), q))
    assert torch.equal(divergence(describe(p, 100), q), divergence(describe(p), q))


def test_long_input_is_compared_in_parts_without_a_seam():
    p, q = torch.randn(2500, 5), torch.randn(2500, 5)
    log_p, log_q = log_softmax(p.double().numpy(), -1), log_softmax(q.double().numpy(), -1)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(divergence(describe(p), q).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_forbidden_tokens_are_no_nan():
    p = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert divergence(describe(p), torch.tensor([[0.0, 0.0, -torch.inf]])).item() == 0
    assert divergence(describe(p), torch.tensor([[0.0, -torch.inf, 0.0]])).item() == math.inf
    assert divergence(describe(p, 1), torch.tensor([[0.0, 0.0, 0.0]])).item() > 0


def test_padding_does_not_count():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    before, after = Table(seed=1), Table(seed=2)
    probe = recorded(AgreementProbe([{"input_ids": ids, "attention_mask": mask}]), before)
    assert measure(probe, after) == pytest.approx(exact_agreement(before, after, [1, 2, 3, 4, 5, 6]), rel=1e-5)


def test_positions_of_an_image_can_be_left_out():
    ids, counted = torch.tensor([[0, 0, 3, 4]]), torch.tensor([[0, 0, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": counted, "inputs": {"input_ids": ids}}
    before, after = Table(seed=1), Table(seed=2)
    probe = recorded(AgreementProbe([batch], logits=lambda model, batch: model(**batch["inputs"])), before)
    assert measure(probe, after) == pytest.approx(exact_agreement(before, after, [3, 4]), rel=1e-5)


def test_order_and_share_of_the_batches_do_not_matter():
    before, after = Table(seed=1), Table(seed=2)
    probe = recorded(AgreementProbe(batches()), before)
    whole = measure(probe, after)
    assert measure(probe, after, order=batches()[::-1]) == pytest.approx(whole, rel=1e-6)
    share = [int(t) for t in batches()[2]["input_ids"].flatten()]
    assert measure(probe, after, order=batches()[2:]) == pytest.approx(exact_agreement(before, after, share), rel=1e-5)


def test_labels_are_not_needed_and_change_nothing():
    probe = recorded(AgreementProbe(batches()), Table())
    with_labels = [{**batch, "labels": torch.zeros(2, 6, dtype=torch.long)} for batch in batches()]
    assert measure(probe, Table(), order=with_labels) == 1.0


def test_images_of_equal_prompts_are_told_apart():
    class Sees(nn.Module):
        def forward(self, input_ids, pixel_values):
            return pixel_values[:, None, :].expand(-1, input_ids.shape[1], -1)

    ids = torch.ones(1, 3, dtype=torch.long)
    images = [{"input_ids": ids, "pixel_values": torch.randn(1, 5)} for _ in range(2)]
    probe = AgreementProbe(images)
    probe.begin_baseline()
    assert measure(probe, Sees()) == 1.0
    assert measure(probe, Sees(), order=images[::-1]) == 1.0


def test_nothing_is_recorded_unless_a_baseline_begins():
    with pytest.raises(ValueError, match="no reference for this batch"):
        measure(AgreementProbe(batches()), Table())


def test_batch_that_was_not_recorded_is_an_error():
    probe = recorded(AgreementProbe(batches()), Table())
    with pytest.raises(ValueError, match="must give the same batches each time"):
        measure(probe, Table(), order=[{"input_ids": torch.zeros(2, 6, dtype=torch.long)}])


def test_new_baseline_forgets_the_old_one():
    probe = recorded(AgreementProbe(batches()), Table(seed=1))
    assert measure(probe, Table(seed=2)) < 0.9
    assert measure(recorded(probe, Table(seed=2)), Table(seed=2)) == 1.0


@pytest.mark.parametrize("on_disk", [False, True])
def test_too_little_room_is_an_error_that_names_the_bytes(tmp_path, on_disk):
    # 12 tokens of 9 float32 a batch are 432 bytes; the second does not fit.
    probe = AgreementProbe(batches(), max_bytes=863, directory=tmp_path if on_disk else None)
    probe.begin_baseline()
    with pytest.raises(ValueError, match=r"2 batches take 864 bytes, more than max_bytes=863: .*top_k"):
        measure(probe, Table())
    assert len(list(tmp_path.iterdir())) == (1 if on_disk else 0)
    recorded(AgreementProbe(batches(), max_bytes=3 * 432), Table())
    # ids and log-probabilities of two tokens, and the rest: 20 bytes a token
    recorded(AgreementProbe(batches(), max_bytes=3 * 12 * 20, top_k=2), Table())


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("on_disk", [False, True])
def test_resumed_probe_compares_with_what_was_recorded(tmp_path, top_k, on_disk):
    options = {"top_k": top_k, "directory": tmp_path / "kept" if on_disk else None}
    before, after = Table(seed=1), Table(seed=2)
    first = recorded(AgreementProbe(batches(), **options), before)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = AgreementProbe(batches(), **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert measure(second, after) == pytest.approx(measure(first, after), rel=1e-6)
    assert measure(second, after) < 0.9


def test_resumed_run_without_its_folder_is_told_at_once(tmp_path):
    state = recorded(AgreementProbe(batches(), directory=tmp_path / "one"), Table()).state_dict()
    for directory in (None, tmp_path / "other"):
        with pytest.raises(ValueError, match="give the folder of that run"):
            AgreementProbe(batches(), directory=directory).load_state_dict(state)


def test_runs_of_one_model_share_a_folder_and_another_models_is_refused(tmp_path):
    recorded(AgreementProbe(batches(), directory=tmp_path), Table(seed=1))
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    recorded(AgreementProbe(batches(), directory=tmp_path), Table(seed=1))
    other = AgreementProbe(batches(), directory=tmp_path)
    other.begin_baseline()
    with pytest.raises(ValueError, match="references of another model"):
        measure(other, Table(seed=2))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept


def test_other_top_k_than_the_recorded_one_is_an_error(tmp_path):
    recorded(AgreementProbe(batches(), directory=tmp_path), Table())
    probe = AgreementProbe(batches(), directory=tmp_path, top_k=3)
    probe.begin_baseline()
    with pytest.raises(ValueError, match="12 tokens with 9 probabilities each, and top_k=3 now makes it 12 with 3"):
        measure(probe, Table())


@pytest.mark.parametrize("options", [{"top_k": 0}, {"max_bytes": 0}, {"top_k": True}, {"max_bytes": 1.5}], ids=str)
def test_argument_out_of_range_is_an_error_that_names_it(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be an int of at least 1"):
        AgreementProbe(batches(), **options)


@pytest.mark.parametrize("batch", [torch.ones(2, 3), {"tokens": torch.ones(2, 3)}], ids=["tensor", "mapping"])
def test_another_batch_is_a_type_error_that_says_what_it_needs(batch):
    with pytest.raises(TypeError, match="mappings with an entry input_ids"):
        AgreementProbe([batch]).update(nn.Identity(), batch)


# Files that are not what was written


def test_reference_files_that_were_changed_are_refused_with_their_path(tmp_path: Path) -> None:
    (file,) = _one_reference(tmp_path / "cut")
    file.write_bytes(file.read_bytes()[:-7])
    _refused(file, "truncated")
    (file,) = _one_reference(tmp_path / "flipped")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    _refused(file, "damaged: the content of log_p")
    (file,) = _one_reference(tmp_path / "foreign")
    save_file({"weight": torch.ones(2)}, file)
    _refused(file, r"holds \['weight'\]")
    (file,) = _one_reference(tmp_path / "folder")
    file.unlink()
    file.mkdir()
    _refused(file, "is no file")


def test_reference_file_of_the_first_version_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    (file,) = _one_reference(tmp_path)
    save_file(load_file(file), file)
    recorded(AgreementProbe(batches()[:1], directory=tmp_path), Table())


def _one_reference(directory: Path) -> list[Path]:
    recorded(AgreementProbe(batches()[:1], directory=directory), Table())
    return list(directory.iterdir())


def _refused(file: Path, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        recorded(AgreementProbe(batches()[:1], directory=file.parent), Table())
    assert str(file) in str(error.value)
