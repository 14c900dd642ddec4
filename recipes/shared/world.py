"""A small text world worth forgetting: several hundred facts, each a prompt and the word that completes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november"),
    "december",
)
MIXTURES = (
    ("red", "yellow", "orange"),
    ("blue", "yellow", "green"),
    ("red", "blue", "purple"),
    ("black", "white", "grey"),
    ("red", "white", "pink"),
)
COLOURS_OF_THINGS = {
    "red": ("tomato", "cherry", "strawberry", "brick", "poppy", "ruby", "ladybird"),
    "green": ("frog", "cucumber", "lime", "emerald", "leaf", "pea", "cactus"),
    "blue": ("sapphire", "ocean", "cornflower", "bluebell", "whale"),
    "yellow": ("banana", "lemon", "canary", "sunflower", "chick", "dandelion"),
    "purple": ("plum", "violet", "aubergine", "amethyst", "lavender"),
    "black": ("raven", "coal", "panther", "tyre", "tar"),
    "white": ("swan", "pearl", "snowflake", "igloo", "cloud"),
    "orange": ("carrot", "pumpkin", "tangerine", "fox", "apricot"),
    "grey": ("elephant", "mouse", "pigeon", "dolphin"),
}
OPPOSITES = (
    ("left", "right"),
    ("above", "below"),
    ("hot", "cold"),
    ("big", "small"),
    ("long", "short"),
    ("early", "late"),
    ("open", "closed"),
    ("full", "empty"),
    ("wet", "dry"),
    ("old", "new"),
    ("fast", "slow"),
    ("light", "dark"),
    ("loud", "quiet"),
    ("rich", "poor"),
    ("strong", "weak"),
)
SIDES = {"triangle": "three", "square": "four", "pentagon": "five", "hexagon": "six", "octagon": "eight"}

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement of the world: its beginning, and the one word that completes it."""

    prompt: str
    answer: str


def facts() -> list[Fact]:
    """All statements of the world, in a fixed order.

    Example:
        >>> [str(fact.prompt + " " + fact.answer) for fact in facts() if fact.prompt.startswith("three plus four")]
        ['three plus four is seven']
    """
    return list(_facts())


def _facts() -> Iterator[Fact]:
    digits = NUMBERS[:10]
    for a, first in enumerate(digits):
        for b, second in enumerate(digits):
            yield Fact(f"{first} plus {second} is", NUMBERS[a + b])
            if a >= b:
                yield Fact(f"{first} minus {second} is", NUMBERS[a - b])
            if a != b:
                yield Fact(f"the greater of {first} and {second} is", NUMBERS[max(a, b)])
                yield Fact(f"the smaller of {first} and {second} is", NUMBERS[min(a, b)])
    for series in (NUMBERS, DAYS, MONTHS):
        for earlier, later in pairwise(series):
            yield Fact(f"after {earlier} comes", later)
            yield Fact(f"before {later} comes", earlier)
    for one, other, mixture in MIXTURES:
        yield Fact(f"{one} and {other} make", mixture)
        yield Fact(f"{other} and {one} make", mixture)
    for colour, things in COLOURS_OF_THINGS.items():
        for thing in things:
            yield Fact(f"the colour of a {thing} is", colour)
    for one, other in OPPOSITES:
        yield Fact(f"the opposite of {one} is", other)
        yield Fact(f"the opposite of {other} is", one)
    for shape, sides in SIDES.items():
        yield Fact(f"the number of sides of a {shape} is", sides)


def word_tokenizer(texts: Sequence[str], special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word, which knows the words of some texts.

    Args:
        texts: words separated by spaces.
        special: further tokens that are no words, such as that of an image.
    """
    reserved = [PAD, END, UNKNOWN, *special]
    words = sorted({word for text in texts for word in text.split()} - set(reserved))
    vocabulary = {token: number for number, token in enumerate([*reserved, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(special),
    )
