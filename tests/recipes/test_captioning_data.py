import json

import pytest
from families import make
from PIL import Image

from recipes.captioning.data import CaptionData, CaptionedImages


def folder_of(tmp_path, *lines):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_folder_gives_its_images_in_colour_with_their_captions(tmp_path):
    lines = [json.dumps({"image": name, "caption": f" a {name} "}) for name in ("a.png", "grey.png")]
    images = CaptionedImages(folder_of(tmp_path, *lines, ""), prompt="what is it ?")
    assert [sample.answer for sample in images] == ["a a.png", "a grey.png"]
    assert {sample.image.mode for sample in images} == {"RGB"}
    assert {sample.prompt for sample in images} == {"what is it ?"}


@pytest.mark.parametrize(
    "line",
    ["no json", '{"image": "a.png"}', '{"image": "a.png", "caption": ""}', '{"image": "a.png", "caption": 3}', "[]"],
)
def test_line_of_another_form_is_named(tmp_path, line):
    good = json.dumps({"image": "a.png", "caption": "a cat"})
    with pytest.raises(ValueError, match="line 2"):
        CaptionedImages(folder_of(tmp_path, good, line), prompt="")


def test_missing_image_and_missing_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"line 1: there is no file .*nowhere\.png"):
        CaptionedImages(folder_of(tmp_path, '{"image": "nowhere.png", "caption": "a cat"}'), prompt="")
    (tmp_path / "captions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no captions\.jsonl"):
        CaptionedImages(tmp_path, prompt="")


def test_last_images_of_a_folder_are_held_out(tmp_path):
    lines = [json.dumps({"image": "a.png", "caption": f"a cat {number}"}) for number in range(5)]
    data = CaptionData(str(make("llava", tmp_path)), data=str(folder_of(tmp_path, *lines)), test_size=2, batch_size=2)
    data.setup("fit")
    assert [sample.answer for sample in data.test_images] == ["a cat 3", "a cat 4"]
    assert [sample.answer for sample in data.train_images] == ["a cat 0", "a cat 1", "a cat 2"]
    assert len(data.train_dataloader()) == 1


def test_too_few_images_are_an_error(tmp_path):
    lines = [json.dumps({"image": "a.png", "caption": "a cat"})]
    data = CaptionData(str(make("llava", tmp_path)), data=str(folder_of(tmp_path, *lines)), test_size=2)
    with pytest.raises(ValueError, match="has 1 images, and test_size=2 leaves none"):
        data.setup("fit")
