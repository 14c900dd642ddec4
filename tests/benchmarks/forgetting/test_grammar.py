import torch

from benchmarks.forgetting.grammar import agreement_pairs, preference


def test_whoever_prefers_one_number_gets_half_of_the_pairs_right():
    pairs = agreement_pairs()
    assert len(set(pairs)) == len(pairs) == 120
    for verb in (" is", " are"):
        assert sum(right.endswith(verb) for right, _ in pairs) == 60
    assert all(right.rsplit(" ", 1)[0] == wrong.rsplit(" ", 1)[0] for right, wrong in pairs)


def test_the_likelier_sentence_counts_without_its_padding():
    # Each token is followed by the next number with a probability of nearly one.
    module = lambda input_ids, attention_mask: 20 * torch.nn.functional.one_hot(input_ids + 1, 10).float()  # noqa: E731
    ids = torch.tensor([[[1, 2, 3, 0], [1, 2, 4, 5]], [[1, 3, 2, 0], [1, 2, 0, 0]]])
    mask = torch.tensor([[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 0, 0]]])
    found = preference(module, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(found, torch.tensor([[0.0, -20.0], [-40.0, 0.0]]), atol=1e-5, rtol=0)
