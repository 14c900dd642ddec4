"""What a module says of a batch, from modules as users write them."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from tiny import Up
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from kappa_lightning import AccuracyProbe, Probe
from kappa_lightning.probes.inputs import GeneratedText, ReferenceInputs, TaskInputs
from kappa_lightning.probes.output import Bernoulli, Gaussian
from kappa_lightning.probes.resolving import resolve_reference
from kappa_lightning.probes.synthesized import SynthesizedInputs

IMAGE = 9


def llama_config():
    return LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


class Language(pl.LightningModule):
    """As most people write it: no forward, the loss from the model."""

    def __init__(self, model=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = model or LlamaForCausalLM(llama_config())

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss


class Classifier(pl.LightningModule):
    def __init__(self, outputs=4):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, outputs)

    def forward(self, x):
        return self.layer(x)


class Nothing(pl.LightningModule):
    """A module without a forward, whose inside nobody knows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)


def llava():
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=llama_config(), image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def rows(module, batch, reference="inputs"):
    return resolve_reference(reference, module).distribution(module, batch)


def test_language_model_without_a_forward_is_asked_at_every_token_that_is_attended_to():
    module = Language().eval()
    ids, mask = torch.tensor([[1, 3, 5, 2], [1, 4, 2, 2]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.full((2, 4), -100)}
    found = rows(module, batch)
    torch.testing.assert_close(found.logits, module.model(input_ids=ids, attention_mask=mask).logits[mask.bool()])


def test_classifier_is_asked_with_the_first_entry_of_the_batch():
    module, x = Classifier(), torch.randn(5, 3)
    assert torch.equal(rows(module, (x, torch.zeros(5, dtype=torch.int64))).logits, module(x))
    assert torch.equal(rows(module, [x]).logits, module(x))
    assert torch.equal(rows(module, x).logits, module(x))


class Summed(Classifier):
    """Takes two inputs."""

    def forward(self, x, y):
        return self.layer(x + y)


class Whole(Classifier):
    """Takes the batch itself."""

    def forward(self, batch):
        return self.layer(batch["image"])


def test_module_that_takes_several_inputs_gets_those_before_the_labels():
    x, y, labels = torch.ones(2, 3), torch.eye(2, 3), torch.tensor([1, 0])
    module = Summed()
    said = TaskInputs().distribution(module, [x, y, labels])
    torch.testing.assert_close(said.logits, module.layer(x + y))


def test_module_that_takes_a_mapping_itself_gets_it():
    module, images = Whole(), torch.ones(2, 3)
    said = TaskInputs().distribution(module, {"image": images, "label": torch.tensor([1, 0])})
    torch.testing.assert_close(said.logits, module.layer(images))


@pytest.mark.parametrize(
    ("module", "batch"),
    [
        (Summed(), [torch.ones(2, 3), torch.ones(2, 3)]),
        (Summed(), torch.ones(2, 3)),
        (Summed(), {"image": torch.ones(2, 3)}),
        (Summed(), {"x": torch.ones(2, 3), "image": torch.ones(2, 3)}),
    ],
)
def test_forward_of_other_arguments_is_an_error_that_says_what_to_write(module, batch):
    with pytest.raises(
        TypeError, match=r"forward of Summed takes \(x, y\), and not .* output_distribution\(self, batch"
    ):
        TaskInputs().distribution(module, batch)


def test_classes_of_a_segmentation_are_where_its_labels_leave_them():
    module = nn.Conv2d(1, 6, 1)
    x = torch.randn(2, 1, 3, 4)
    found = rows(module, (x, torch.zeros(2, 3, 4, dtype=torch.int64)))
    torch.testing.assert_close(found.logits, module(x).movedim(1, -1).reshape(24, 6))


@pytest.mark.parametrize("labels", [torch.zeros(5, 4), torch.zeros(5, 4, dtype=torch.int64)])
def test_outputs_that_are_no_classes_are_not_taken_for_classes(labels):
    with pytest.raises(TypeError, match=r"Classifier returns \(5, 4\) and the batch's labels are.*output_distribution"):
        rows(Classifier(), (torch.randn(5, 3), labels))


class Reading(Classifier):
    """Takes the batch itself, its labels under another name."""

    def forward(self, batch):
        return self.layer(batch["x"])


@pytest.mark.parametrize("module", [Classifier(), Reading()])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_regression_whose_labels_are_called_y_is_not_taken_for_a_softmax(module, dtype):
    with pytest.raises(TypeError, match=r"returns \(5, 4\) and the batch's labels are.*output_distribution"):
        TaskInputs().distribution(module, {"x": torch.randn(5, 3), "y": torch.zeros(5, 4, dtype=dtype)})
    said = TaskInputs().distribution(module, {"x": torch.randn(5, 3), "y": torch.zeros(5, dtype=torch.int64)})
    assert said.logits.shape == (5, 4)


def test_input_that_is_called_y_is_no_label():
    said = TaskInputs().distribution(Summed(), {"x": torch.zeros(2, 3), "y": torch.ones(2, 3)})
    torch.testing.assert_close(said.logits, Summed().layer(torch.ones(2, 3)))


def test_integers_that_number_no_classes_are_not_taken_for_classes():
    x = torch.randn(3, 3)
    with pytest.raises(TypeError, match=r"4 outputs and the batch's labels hold 4 and 90, which are no numbers of 4"):
        rows(Classifier(), (x, torch.tensor([4, 90, 1])))
    with pytest.raises(TypeError, match="hold -3 and -1"):
        rows(Classifier(), (x, torch.tensor([-3, -1, 1])))
    for ignored in (-100, 255, -1):
        assert len(rows(Classifier(), (x, torch.tensor([ignored, 3, ignored])))) == 3


def test_regression_with_one_output_is_not_taken_for_a_softmax():
    with pytest.raises(TypeError, match=r"one output.*Gaussian"):
        rows(Classifier(outputs=1), (torch.randn(5, 3),))


def test_module_that_says_nothing_is_an_error_that_says_what_to_write():
    for batch in ([torch.randn(5, 3)], {"x": torch.randn(5, 3)}):
        with pytest.raises(TypeError, match=r"Nothing .*forward.*output_distribution\(self, batch\)"):
            rows(Nothing(), batch)


def test_module_says_itself_what_its_outputs_mean():
    class Regression(Nothing):
        def output_distribution(self, batch):
            return Gaussian(self.layer(batch[0]), scale=0.1)

    assert isinstance(rows(Regression(), (torch.randn(5, 3), torch.randn(5, 4))), Gaussian)


def test_function_of_the_user_comes_first_and_may_return_logits():
    module, x = Classifier(), torch.randn(5, 3)
    reference = TaskInputs(output=lambda module, batch: 2 * module(batch["x"]))
    assert torch.equal(rows(module, {"x": x}, reference).logits, 2 * module(x))
    with pytest.raises(TypeError, match="output is a str"):
        rows(module, {"x": x}, TaskInputs(output=lambda module, batch: "no"))


def test_sequence_classifier_of_transformers_is_asked_by_keyword():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    module = Language(BertForSequenceClassification(config)).eval()
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([2]), "idx": torch.tensor([7])}
    assert torch.equal(rows(module, batch).logits, module.model(input_ids=batch["input_ids"]).logits)
    module.model.config.problem_type = "multi_label_classification"
    assert isinstance(rows(module, batch), Bernoulli)
    module.model.config.problem_type = "regression"
    with pytest.raises(TypeError, match="BertForSequenceClassification is a regression"):
        rows(module, batch)


def test_encoder_decoder_is_asked_at_its_labels():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    module = Language(T5ForConditionalGeneration(config)).eval()
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[6, 7, -100, -100]])}
    assert len(rows(module, batch)) == 2
    assert isinstance(resolve_reference("auto", module), TaskInputs)
    with pytest.raises(ValueError, match=r"causal or image-text.*only T5ForConditionalGeneration"):
        resolve_reference("generated", module)


def test_auto_is_text_of_the_models_own_where_it_can_write_and_synthesized_inputs_elsewhere():
    assert isinstance(resolve_reference("auto", Language()), GeneratedText)
    assert resolve_reference("generated", Language()).num_sequences == 64
    assert resolve_reference("auto", Language(), few=True).num_sequences == 4
    own = GeneratedText(9)
    assert resolve_reference(own, Language(), few=True) is own
    assert isinstance(resolve_reference("auto", Classifier()), SynthesizedInputs)
    assert isinstance(resolve_reference("auto", Language(llava())), GeneratedText)


def test_word_that_is_no_reference_and_iterator_are_refused():
    with pytest.raises(ValueError, match="reference='wikitext' is unknown"):
        resolve_reference("wikitext", Classifier())
    with pytest.raises(TypeError, match="cannot be read again"):
        resolve_reference(iter([1]), Classifier())


def test_batches_of_the_user_need_nothing_of_the_task():
    batches = [torch.randn(2, 3)]
    assert resolve_reference(batches, Classifier()).prepare(Classifier()) is batches


def test_generated_text_counts_up_to_the_token_before_the_end():
    module = Language().eval()
    reference = GeneratedText(num_sequences=12, num_tokens=10, batch_size=5)
    batches = list(reference.prepare(module))
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 2]
    counted = sum(len(reference.distribution(module, batch)) for batch in batches)
    assert counted == sum(int(batch["attention_mask"].sum()) for batch in batches) < 120


def test_text_through_adapters_is_that_of_the_model_inside():
    from peft import LoraConfig, get_peft_model

    plain = Language().eval()
    expected = list(GeneratedText(4, 6).prepare(plain))
    adapted = Language(get_peft_model(Language().model, LoraConfig(target_modules=["q_proj"]))).eval()
    found = list(GeneratedText(4, 6).prepare(adapted))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(expected, found, strict=True))


def image_batch():
    torch.manual_seed(1)
    images = [IMAGE] * 4
    ids = torch.tensor([[1, *images, 3, 4, 5, 6], [1, *images, 7, 5, 2, 2]])
    mask = torch.tensor([[1] * 9, [1] * 7 + [0, 0]])
    labels = ids.clone()
    labels[0, :7], labels[1, :6], labels[1, 7:] = -100, -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.randn(2, 3, 8, 8)}


def test_image_text_model_writes_on_from_the_prompts_and_images_of_the_task():
    module, batch = Language(llava()), image_batch()
    reference = GeneratedText(num_tokens=5, images=True)
    (found,) = reference.prepare(module, [batch])
    assert torch.equal(found["pixel_values"], batch["pixel_values"])
    for row, prompt in enumerate((batch["input_ids"][0, :7], batch["input_ids"][1, :6])):
        assert found["input_ids"][row, : len(prompt)].tolist() == prompt.tolist()
        assert found["labels"][row, : len(prompt)].tolist() == [-100] * len(prompt)
        # What it wrote is likely under the model with the image, token by token as one forward pass gives it.
    counted = int((found["labels"] != -100).sum())
    assert len(reference.distribution(module, found)) == counted
    assert 2 <= counted <= 10


def test_image_text_model_samples_what_one_pass_over_the_whole_text_says():
    # With every other token all but impossible, the drawn ones must be the likeliest of the whole text's pass.
    module, batch = Language(llava()), image_batch()
    module.model.lm_head.weight.data *= 200
    reference = GeneratedText(num_tokens=5, images=True)
    (found,) = reference.prepare(module, [batch])
    likeliest = reference.distribution(module, found).logits.argmax(-1)
    assert torch.equal(likeliest, found["labels"][found["labels"] != -100])


def test_image_text_model_finds_its_inputs_inside_a_batch():
    module, batch = Language(llava()), image_batch()
    (expected,) = GeneratedText(num_tokens=5, images=True).prepare(module, [batch])
    for nested in ({"inputs": batch, "samples": ["a", "b"]}, (batch, torch.zeros(2))):
        (found,) = GeneratedText(num_tokens=5, images=True).prepare(module, [nested])
        assert torch.equal(found["input_ids"], expected["input_ids"])
    for unclear in ({"one": batch, "other": batch}, torch.zeros(2)):
        with pytest.raises(ValueError, match="hold no mapping with input_ids"):
            GeneratedText(num_tokens=5, images=True).prepare(module, [unclear])


def test_image_text_model_writes_text_without_images():
    module = Language(llava())
    module.model.config.text_config.bos_token_id = module.model.generation_config.bos_token_id = None
    batches = GeneratedText(num_sequences=24, num_tokens=5).prepare(module)
    text = torch.cat([batch["input_ids"] for batch in batches])
    assert {tuple(batch) for batch in batches} == {("input_ids", "attention_mask")}
    # Without a begin token of its own it begins with tokens of text, none of which stands for an image.
    assert len(set(text[:, 0].tolist())) > 2
    assert IMAGE not in text[:, 0].tolist()
    module.model.config.text_config.bos_token_id = 1
    (batch,) = GeneratedText(num_sequences=4, num_tokens=5).prepare(module)
    assert batch["input_ids"][:, 0].tolist() == [1] * 4


def test_image_text_model_needs_images_from_the_task():
    with pytest.raises(ValueError, match="takes images, and there is no batch of the task"):
        GeneratedText(images=True).prepare(Language(llava()), [])


def test_tokens_that_stand_for_an_image_do_not_count():
    module, batch = Language(llava()), image_batch()
    assert len(rows(module, batch)) == 5 + 3


def test_dataloader_that_is_read_once_is_refused():
    with pytest.raises(TypeError, match="is a generator"):
        ReferenceInputs(x for x in [1])


# Names and labels


@pytest.mark.parametrize("name", ["retention", "forgetting"])
def test_probe_named_as_another_figure_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"name='{name}' is the tag of another figure"):
        Probe([0], Up(), lambda module, batch: batch, name=name)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.eye(3), r"torch\.float32 of shape \(3, 3\)"),
        (torch.eye(3, dtype=torch.int64), r"torch\.int64 of shape \(3, 3\)"),
        (torch.tensor([[0], [1], [1]]), r"torch\.int64 of shape \(3, 1\)"),
        (torch.tensor([0.0, 1.0, 1.0]), r"torch\.float32 of shape \(3,\)"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(labels: Tensor, match: str) -> None:
    batch = (torch.eye(3), labels)
    with pytest.raises(ValueError, match=rf"class numbers of shape \(3,\) for logits of shape \(3, 3\).*{match}"):
        AccuracyProbe([batch]).update(nn.Identity(), batch)
