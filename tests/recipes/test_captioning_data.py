import json
import sys
from types import SimpleNamespace

import pytest
from families import make
from PIL import Image

from recipes.captioning.data import CaptionData, CaptionedImages, HubImages


def folder_of(tmp_path, *lines):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_folder_gives_its_images_in_color_with_their_captions(tmp_path):
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


def test_photo_is_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: the first row of pixels is the right-hand side
    Image.new("RGB", (8, 4), "red").save(tmp_path / "held.jpg", exif=exif)
    images = CaptionedImages(folder_of(tmp_path, '{"image": "held.jpg", "caption": "a cat"}'), prompt="")
    assert images[0].image.size == (4, 8)


def test_longer_images_are_shrunk(tmp_path):
    Image.new("RGB", (80, 20), "red").save(tmp_path / "long.png")
    lines = [json.dumps({"image": name, "caption": "a cat"}) for name in ("long.png", "a.png")]
    images = CaptionedImages(folder_of(tmp_path, *lines), prompt="", max_edge=40)
    assert [sample.image.size for sample in images] == [(40, 10), (8, 8)]


class Rows(list):
    column_names = ("image", "caption")


def hub_images(monkeypatch, *rows):
    loaded = Rows({"image": image, "caption": caption} for image, caption in rows)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, subset, split: loaded))
    return HubImages("some/pictures", "train", "what is it ?", "image", "caption")


def test_rows_of_a_hub_data_set_give_the_first_of_their_captions(monkeypatch):
    picture = Image.new("L", (8, 8))
    images = hub_images(monkeypatch, (picture, " a cat "), (picture, ["a dog", "it runs"]))
    assert [images[0].answer, images[1].answer] == ["a cat", "a dog"]
    assert images[0].image.mode == "RGB"


@pytest.mark.parametrize("caption", [None, "", [], 3])
def test_row_without_a_caption_is_named(monkeypatch, caption):
    images = hub_images(monkeypatch, (Image.new("L", (8, 8)), caption))
    with pytest.raises(ValueError, match="row 0: caption_column='caption' holds no text"):
        images[0]


def test_row_without_an_image_is_named(monkeypatch):
    with pytest.raises(ValueError, match="row 0: image_column='image' holds no image but a str"):
        hub_images(monkeypatch, ("http://a.png", "a cat"))[0]
