import pytest
import torch
from families import FAMILIES, image_processor, make, tokenizer_of
from PIL import Image
from transformers import AutoProcessor, Gemma3Processor

from recipes.shared.encoding import SHOWN_EDGE, Encoder, Sample, prompt_of

PICTURES = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 20), "blue")
SAMPLES = [
    Sample("what is this ?", "a red cat sits .", PICTURES[0]),
    Sample("what is this ?", "a dog .", PICTURES[1]),
]
SQUARE = {  # an image of 40×40 is cut into four, each of them and the whole being four tokens
    f"row_{row}_col_{column}": ["<fake_token_around_image>", f"<row_{row}_col_{column}>", *["<image>"] * 4]
    for row in (1, 2)
    for column in (1, 2)
}
WIDE = {name: tokens for name, tokens in SQUARE.items() if name.startswith("row_1")}
WHOLE = ["<fake_token_around_image>", "<global-img>", *["<image>"] * 4, "<fake_token_around_image>"]
ASKED = ["what", "is", "this", "?"]
PROMPTS = {
    "llava": [["<s>", "USER:", *["<image>"] * 4, *ASKED, "ASSISTANT:"]] * 2,
    "idefics3": [
        [
            "<|im_start|>",
            "User:",
            *(token for part in parts.values() for token in part),
            *WHOLE,
            *ASKED,
            "<end_of_utterance>",
            "Assistant:",
        ]
        for parts in (SQUARE, WIDE)
    ],
    "paligemma": [[*["<image>"] * 4, "<bos>", *ASKED]] * 2,
}
ANSWERS = [["a", "red", "cat", "sits", "."], ["a", "dog", "."]]
ENDS = {"llava": "</s>", "idefics3": "<end_of_utterance>", "paligemma": "<eos>"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(family, tmp_path_factory):
    return Encoder(AutoProcessor.from_pretrained(make(family, tmp_path_factory.mktemp("hub"))))


def test_labels_are_the_answer_and_its_end_token_and_nothing_else(family, encoder):
    batch = encoder(SAMPLES)
    width = max(map(len, PROMPTS[family]))
    for row, (prompt, answer) in enumerate(zip(PROMPTS[family], ANSWERS, strict=True)):
        before, after = width - len(prompt), len(ANSWERS[0]) - len(answer)
        tokens = [*["<pad>"] * before, *prompt, *answer, ENDS[family], *["<pad>"] * after]
        assert encoder.tokenizer.convert_ids_to_tokens(batch["inputs"]["input_ids"][row].tolist()) == tokens
        ids = encoder.tokenizer.convert_tokens_to_ids([*answer, ENDS[family]])
        assert batch["inputs"]["labels"][row].tolist() == [-100] * width + ids + [-100] * after
        mask = [0] * before + [1] * (len(tokens) - before - after) + [0] * after
        assert batch["inputs"]["attention_mask"][row].tolist() == mask


def test_model_is_asked_with_exactly_what_stands_before_the_answers(family, encoder):
    batch = encoder(SAMPLES)
    asked = prompt_of(batch)
    alone = Encoder(encoder.processor)([Sample(s.prompt, "a", s.image) for s in SAMPLES])
    assert torch.equal(asked["input_ids"], alone["inputs"]["input_ids"][:, :-2])
    assert "labels" not in asked
    images = [name for name in batch["inputs"] if name.startswith("pixel")]
    assert images
    assert all(torch.equal(asked[name], batch["inputs"][name]) for name in images)


def test_tokens_say_which_part_is_generated_where_a_model_wants_to_know(family, encoder):
    batch = encoder(SAMPLES)
    if family == "paligemma":
        prompt = batch["prompt_length"]
        assert batch["inputs"]["token_type_ids"][:, :prompt].eq(0).all()
        assert batch["inputs"]["token_type_ids"][:, prompt:].eq(1).all()
    else:
        assert "token_type_ids" not in batch["inputs"]


def test_generated_tokens_are_read_up_to_the_end_token(family, encoder):
    ids = encoder.tokenizer.convert_tokens_to_ids(["a", "dog", ENDS[family], "cat", "cat"])
    assert encoder.decode(torch.tensor([ids])) == ["a dog"]


def test_sample_without_an_image_among_others_is_an_error(encoder):
    with pytest.raises(ValueError, match="sample 1 of the batch has no image"):
        encoder([SAMPLES[0], Sample("what is this ?", "a dog .")])


def test_text_is_encoded_without_images(encoder):
    batch = encoder([Sample("what is this ?", "a dog .")] * 2)
    assert not [name for name in batch["inputs"] if name.startswith("pixel")]
    assert (batch["inputs"]["labels"] != -100).sum() == 8


def test_template_that_asks_otherwise_than_it_answers_is_an_error(tmp_path):
    processor = AutoProcessor.from_pretrained(make("llava", tmp_path))
    processor.chat_template = (
        "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    with pytest.raises(ValueError, match="the chat template asks with"):
        Encoder(processor)([Sample("what", "a dog")])


def test_tokenizer_without_an_end_token_is_an_error(tmp_path):
    processor = AutoProcessor.from_pretrained(make("llava", tmp_path))
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end token"):
        Encoder(processor)


GEMMA_TEMPLATE = (
    "<bos> {% for message in messages %}<start_of_turn> {{ message['role'] }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} <end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn> assistant {% endif %}"
)


def test_answers_of_gemma_3_are_text_and_no_image_whose_tokens_see_each_other():
    marks = ["<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = tokenizer_of(
        ["<image>", *marks], bos="<bos>", eos="<eos>", first=True,
        extra_special_tokens={"image_token": "<image>", "boi_token": marks[0], "eoi_token": marks[1]},
    )  # fmt: skip
    images = image_processor("Gemma3ImageProcessor", size={"height": 16, "width": 16}, do_pan_and_scan=False)
    processor = Gemma3Processor(images, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4)
    inputs = Encoder(processor)(SAMPLES)["inputs"]
    image = inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")
    assert image.sum() == 8
    assert torch.equal(inputs["token_type_ids"].bool(), image)


def test_batch_carries_photos_small_enough_to_be_shown(encoder):
    photo = Image.new("RGB", (4 * SHOWN_EDGE, SHOWN_EDGE), "red")
    (sample,) = encoder([Sample("what is this ?", "a dog .", photo)])["samples"]
    assert sample.image.size == (SHOWN_EDGE, SHOWN_EDGE // 4)
    assert photo.size == (4 * SHOWN_EDGE, SHOWN_EDGE)
    assert encoder(SAMPLES)["samples"] == SAMPLES


def test_processor_that_does_not_say_where_the_image_goes_is_an_error(tmp_path):
    processor = AutoProcessor.from_pretrained(make("llava", tmp_path))
    processor.chat_template = processor.image_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an image_token"):
        Encoder(processor)(SAMPLES)


def test_cross_attention_is_an_error(encoder, monkeypatch):
    encoded = {"input_ids": torch.ones(2, 3), "cross_attention_mask": torch.ones(2, 3, 1, 4)}
    monkeypatch.setattr(encoder, "_encode_prompts", lambda prompts, images: encoded)
    with pytest.raises(ValueError, match="sees by cross-attention"):
        encoder(SAMPLES)
