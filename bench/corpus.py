"""A text as numbers, cut in two, and the windows of it that a training takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 0.1  # of the text, at its end
MOST_HELD_OUT = 2**17  # characters: they are read one after the other, some 20 times in a run


@dataclass(frozen=True)
class Corpus:
    """A text as numbers: training and held_out int64 (N,), by their place in the alphabet."""

    name: str
    alphabet: str  # the text's distinct characters, sorted
    training: Tensor
    held_out: Tensor
    digest: str  # how sha256 begins, of the text with \n for every end of a line

    @classmethod
    def of(cls, name: str, text: str) -> Corpus:
        """ValueError if there is nothing to learn or to hold out."""
        alphabet = "".join(sorted(set(text)))
        if len(alphabet) < 2 or len(text) < 2 / HELD_OUT:
            raise ValueError(
                f"{name} has {len(text)} characters, {len(alphabet)} of them distinct; expected a text, of "
                "several hundred thousand for a model worth reading"
            )
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        ids = numbers(text, alphabet)
        start = len(ids) - min(MOST_HELD_OUT, round(HELD_OUT * len(ids)))
        return cls(name, alphabet, ids[:start], ids[start:], digest)

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[place] for place in ids)

    @property
    def size(self) -> int:
        return len(self.training) + len(self.held_out)


def numbers(text: str, alphabet: str) -> Tensor:
    """int64 (N,): each character's place in the alphabet. ValueError for one that is not in it."""
    places = {character: place for place, character in enumerate(alphabet)}
    strange = sorted(set(text) - set(places))
    if strange:
        raise ValueError(
            f"the text has {', '.join(map(repr, strange[:5]))}; expected characters that are in the text "
            "that was learnt"
        )
    return torch.tensor([places[character] for character in text], dtype=torch.int64)


def read(path: Path | None) -> Corpus:
    """The text of a UTF-8 file; None for one that every Python carries, the help texts of pydoc.

    OSError or ValueError if it can't be read.
    """
    if path is None:
        from pydoc_data.topics import topics  # half a megabyte

        return Corpus.of("pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics)))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 ({error.reason} at byte {error.start})") from error
    return Corpus.of(path.name, text)


class Windows:
    """An endless text: windows of the training text's B columns, T characters each, one after the other.

    At a column's end all columns begin anew, cut at another place of the text.
    """

    def __init__(self, ids: Tensor, T: int, B: int) -> None:
        if len(ids) < B * (T + 1):
            raise ValueError(
                f"the training text has {len(ids)} characters; expected {B * (T + 1)} at least, for {B} "
                f"columns of {T} and one more: take a longer text, or a smaller --batch or --window"
            )
        self.ids, self.T, self.B = ids, T, B
        self.turn(0)

    def turn(self, offset: int, at: int = 0) -> None:
        """From `at` on in the columns of the text that begins at `offset`."""
        self.offset, self.at = offset, at
        length = len(self.ids) // self.B
        self.columns = self.ids.roll(-offset)[: length * self.B].view(self.B, length).t()

    def next(self, generator: torch.Generator) -> tuple[Tensor, bool]:
        """int64 (T + 1, B), of which the last is only to be foretold; and whether the columns begin here."""
        if self.at + self.T + 1 > len(self.columns):
            self.turn(int(torch.randint(len(self.ids), (), generator=generator)))
        start = self.at
        self.at += self.T
        return self.columns[start : start + self.T + 1], start == 0
