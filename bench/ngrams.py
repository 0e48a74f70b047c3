"""Baselines of the character language model: unigram and n-gram, with interpolated Kneser-Ney smoothing.

    p_k(c | x) = (count_k(x c) - D(count_k(x c)) + freed_k(x) p_{k-1}(c | x')) / sum_c count_k(x c)

x is the k - 1 characters of context and x' the same without its first; p_0 = 1 / V; a context that was never
seen says p_{k-1}(c | x'). count_n counts the text; of shorter grams g, count_k(g) is the number of different
characters found before g. D takes 0 from a count of 0 and D1, D2 or D3 from a count of 1, 2 or more, which
are estimated for each k from how many counts are 1, 2, 3 and 4; freed_k(x) is the sum of what D took from
x's counts. This is the modified Kneser-Ney smoothing, interpolated, of S. F. Chen and J. Goodman, An
Empirical Study of Smoothing Techniques for Language Modeling, Computer Speech and Language 13 (1999).

It is the best of those tried on bench/charlm.py's default text (pydoc_data.topics of Python 3.11, the last
tenth held out). Bits per character of a 5-gram there: absolute discounting 1.991, with three discounts
1.878, Witten-Bell 1.905, Kneser-Ney with one discount 1.786, modified Kneser-Ney 1.739. Unigram: 4.671.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

Ids = Sequence[int] | Tensor
Gram = tuple[int, ...]


class NGram:
    """The probability of a character after the n - 1 before it, as text, the ids of characters, has them.

    text: int64 (length,) or a list of ints, 0 <= id < V, at least n of them. n = 1 is the unigram. The V
    probabilities of every context, seen or not, add up to one, and none is zero.
    """

    def __init__(self, text: Ids, V: int, n: int = 5) -> None:
        for name, value in (("V", V), ("n", n)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        ids = _checked("text", text, V)
        if len(ids) < n:
            raise ValueError(f"text has {len(ids)} characters; expected at least n = {n}: take a longer text")
        self.V, self.n = V, n
        self.text_end = ids[len(ids) - (n - 1) :]
        self.orders = [_Order(Counter(gram[1:] for gram in set(_grams(ids, k + 1)))) for k in range(1, n)]
        self.orders.append(_Order(Counter(_grams(ids, n))))

    def probability(self, context: Ids, c: int) -> float:
        """Of c after context: ids, of which the last n - 1 are looked at; fewer do."""
        before = tuple(_checked("context", context, self.V))
        return self._probability(before, *_checked("c", [c], self.V))

    def bits_per_character(self, held_out: Ids) -> float:
        """The mean of -log2 p over held_out, ids as text's, at least one, which goes on where text ended."""
        held = _checked("held_out", held_out, self.V)
        if not held:
            raise ValueError("held_out is empty; expected at least one character")
        ids = tuple(self.text_end + held)
        first = len(self.text_end)
        bits = (-math.log2(self._probability(ids[i - first : i], ids[i])) for i in range(first, len(ids)))
        return math.fsum(bits) / len(held)

    def _probability(self, context: Gram, c: int) -> float:
        p = 1 / self.V
        for order, length in zip(self.orders, range(len(context) + 1), strict=False):
            x = context[len(context) - length :]
            if x not in order.seen:
                break  # nor is any longer one
            count = order.counts.get((*x, c), 0)
            p = (count - order.discount(count) + order.freed[x] * p) / order.seen[x]
        return p


class _Order:
    """Counts of all grams of one length; of each context their sum and what the discounts take from it."""

    def __init__(self, counts: Counter[Gram]) -> None:
        self.counts = counts
        self.discounts = _discounts(Counter(counts.values()))
        self.seen: Counter[Gram] = Counter()
        self.freed: dict[Gram, float] = {}
        for gram, count in counts.items():
            x = gram[:-1]
            self.seen[x] += count
            self.freed[x] = self.freed.get(x, 0.0) + self.discount(count)

    def discount(self, count: int) -> float:
        return self.discounts[min(count, 3)]


def _discounts(often: Counter[int]) -> tuple[float, float, float, float]:
    """What a count of 0, 1, 2 and more loses, with often[j] grams of count j.

    In a small text the estimates may not exist, or not leave 0 < D_j <= j: then all three are the one
    discount of unmodified Kneser-Ney, or 1/2 if that doesn't exist either.
    """
    n1, n2, n3, n4 = (often[j] for j in (1, 2, 3, 4))
    one = n1 / (n1 + 2 * n2) if n1 else 0.5
    if n1 and n2 and n3:
        three = (1 - 2 * one * n2 / n1, 2 - 3 * one * n3 / n2, 3 - 4 * one * n4 / n3)
        if all(0 < D <= j for j, D in enumerate(three, 1)):
            return 0.0, *three
    return 0.0, one, one, one


def _grams(ids: list[int], k: int) -> zip[Gram]:
    return zip(*(ids[i:] for i in range(k)), strict=False)


def _checked(name: str, ids: Ids, V: int) -> list[int]:
    values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    for value in (min(values), max(values)) if values else ():
        if not 0 <= value < V:
            raise ValueError(f"{name} has the id {value}; expected 0 to {V - 1}, as V is {V}")
    return values
