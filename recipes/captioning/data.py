"""Images and their captions: drawn ones, a folder with a captions.jsonl, or a data set of the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset

from recipes.shared.encoding import Encoder, Sample
from recipes.shared.module import load_encoder
from recipes.shared.shapes import DESCRIBE, random_scene

SCENES = "scenes"
"""The data that needs no file: pictures drawn with Pillow."""

CAPTIONS = "captions.jsonl"


class DrawnScenes(Dataset[Sample]):
    """Scenes of two groups of shapes; the same index is always the same picture.

    Args:
        count: number of scenes.
        seed: of the scenes and their pictures.
        unseen: whether the combinations of colours and shapes are those kept for the test.
    """

    def __init__(self, count: int, seed: int, *, unseen: bool) -> None:
        self.count = count
        self.seed = seed
        self.unseen = unseen

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = random.Random(f"{self.seed} {index} {self.unseen}")
        scene = random_scene(rng, unseen=self.unseen)
        return Sample(DESCRIBE, scene.caption, scene.draw(rng))


class CaptionedImages(Dataset[Sample]):
    """The images of a folder with the captions of its ``captions.jsonl``.

    Every line is an object with ``image``, a path within the folder, and ``caption``.

    Args:
        folder: the folder.
        prompt: what the model is asked about each image.
        max_edge: longer images are shrunk to this longest edge, in pixels; none if ``None``.

    Raises:
        FileNotFoundError: if there is no such file, or an image is missing; the message names it.
        ValueError: if a line has another form; the message names it.
    """

    def __init__(self, folder: Path, prompt: str, max_edge: int | None = None) -> None:
        self.prompt = prompt
        self.max_edge = max_edge
        file = folder / CAPTIONS
        if not file.is_file():
            raise FileNotFoundError(f'{folder} has no {CAPTIONS}: write a line {{"image": …, "caption": …}} an image')
        self.rows: list[tuple[Path, str]] = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                image, caption = folder / row["image"], row["caption"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: not an object with image and caption") from error
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"{file}, line {number}: the caption is empty or no text")
            if not image.is_file():
                raise FileNotFoundError(f"{file}, line {number}: there is no file {image}")
            self.rows.append((image, caption))
        if not self.rows:
            raise ValueError(f"{file} has no captions")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        path, caption = self.rows[index]
        with Image.open(path) as image:
            # Cameras store how they were held beside the pixels.
            turned = ImageOps.exif_transpose(image)
        return Sample(self.prompt, caption.strip(), _in_colour(turned, self.max_edge))


class HubImages(Dataset[Sample]):
    """A split of a hub data set with an image column and a caption column.

    Args:
        dataset: what ``datasets.load_dataset`` takes.
        split: such as ``train``.
        prompt: what the model is asked about each image.
        image_column: the column of the images.
        caption_column: the column of the captions; of a list, the first counts.
        subset: the configuration, of a data set that has several.
        max_edge: as in :class:`CaptionedImages`.

    Raises:
        ModuleNotFoundError: if the package ``datasets`` is not installed.
        ValueError: if there is no such column, or a row has no image or no caption.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        prompt: str,
        image_column: str,
        caption_column: str,
        subset: str | None = None,
        max_edge: int | None = None,
    ) -> None:
        try:
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"data={dataset!r} is no folder, and a hub data set needs: pip install datasets"
            ) from error
        self.rows = load_dataset(dataset, subset, split=split)
        for argument, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in self.rows.column_names:
                raise ValueError(
                    f"{argument}={column!r} is no column of {dataset}: it has {', '.join(self.rows.column_names)}"
                )
        self.prompt = prompt
        self.max_edge = max_edge
        self.image_column = image_column
        self.caption_column = caption_column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        image, caption = row[self.image_column], row[self.caption_column]
        if isinstance(caption, list) and caption:
            caption = caption[0]
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"row {index}: caption_column={self.caption_column!r} holds no text but {caption!r}")
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"row {index}: image_column={self.image_column!r} holds no image but a {type(image).__name__}"
            )
        return Sample(self.prompt, caption.strip(), _in_colour(image, self.max_edge))


def open_images(
    data: str,
    prompt: str,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "caption",
    subset: str | None = None,
    max_edge: int | None = None,
) -> CaptionedImages | HubImages:
    """A folder's images if ``data`` is a folder, else those of a hub data set; the other arguments are theirs."""
    if Path(data).is_dir():
        return CaptionedImages(Path(data), prompt, max_edge)
    return HubImages(data, split, prompt, image_column, caption_column, subset, max_edge)


class CaptionData(pl.LightningDataModule):
    """Images to describe, one part to learn from and one to be tested on.

    Args:
        model: the hub id or folder whose processor encodes them.
        data: ``scenes``, a folder with a ``captions.jsonl``, or a hub data set.
        prompt: what the model is asked about each image.
        batch_size: images in a batch.
        test_size: images that are held out, the last of a folder or data set.
        train_size: images to learn from; of ``scenes`` their number, otherwise all others at most.
        seed: of the drawn scenes.
        image_column: of a hub data set.
        caption_column: of a hub data set.
        split: of a hub data set.
        num_workers: processes that read images.
        subset: the configuration of a hub data set that has several.
        max_edge: longer images are shrunk to this longest edge, in pixels. Some models take images as they are:
            Qwen2-VL makes a token of every 28×28 pixels, more than 15,000 of a photo of 12 megapixels.
    """

    def __init__(
        self,
        model: str,
        data: str = SCENES,
        prompt: str = DESCRIBE,
        batch_size: int = 32,
        test_size: int = 200,
        train_size: int | None = None,
        seed: int = 0,
        image_column: str = "image",
        caption_column: str = "caption",
        split: str = "train",
        num_workers: int = 0,
        subset: str | None = None,
        max_edge: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "test_size": test_size, "train_size": train_size, "max_edge": max_edge}
        for argument, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{argument}={value} must be at least 1")
        self.model = model
        self.data = data
        self.prompt = prompt
        self.batch_size = batch_size
        self.test_size = test_size
        self.train_size = train_size
        self.seed = seed
        self.options: dict[str, Any] = {
            "split": split,
            "image_column": image_column,
            "caption_column": caption_column,
            "subset": subset,
            "max_edge": max_edge,
        }
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        """Find the images and split them."""
        self.encoder: Encoder = load_encoder(self.model, images=True)
        self.train_images, self.test_images = self._split()

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches, as :class:`~recipes.shared.encoding.Encoder` makes them."""
        return self._loader(self.train_images, shuffle=True, drop_last=len(self.train_images) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the images that are held out."""
        return self._loader(self.test_images, shuffle=False, drop_last=False)

    def _split(self) -> tuple[Any, Any]:
        if self.data == SCENES:
            learned = DrawnScenes(self.train_size or 20_000, self.seed, unseen=False)
            return learned, DrawnScenes(self.test_size, self.seed, unseen=True)
        images = open_images(self.data, self.prompt, **self.options)
        learned_from = len(images) - self.test_size
        if learned_from < 1:
            raise ValueError(
                f"data={self.data!r} has {len(images)} images, and test_size={self.test_size} leaves none to learn from"
            )
        count = min(learned_from, self.train_size or learned_from)
        return Subset(images, range(count)), Subset(images, range(learned_from, len(images)))

    def _loader(self, images: Any, **options: Any) -> DataLoader[Any]:
        collate: Callable[[list[Sample]], dict[str, Any]] = self.encoder
        return DataLoader(images, self.batch_size, collate_fn=collate, num_workers=self.num_workers, **options)


def _in_colour(image: Image.Image, max_edge: int | None) -> Image.Image:
    if max_edge is not None:
        image.thumbnail((max_edge, max_edge), reducing_gap=2.0)
    return image.convert("RGB")
