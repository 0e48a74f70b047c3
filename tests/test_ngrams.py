"""The baselines of the character language model: bench/ngrams.py."""

import math
import random
from fractions import Fraction

import pytest
import torch

from bench.ngrams import NGram

LETTERS = "abcdr "
TEXT = "abracadabra barbara cab a bad card a crab abba dada carrara abracadabra bad cab bra"
V = len(LETTERS) + 2  # two that are never seen


def ids(text):
    return [LETTERS.index(c) for c in text]


def random_text(length, seed=0):
    """Random words, some of them again and again, so that counts of 1, 2, 3 and 4 all come up."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdr", k=draw.randint(1, 4))) for _ in range(40)]
    text = " ".join(draw.choices(words, weights=[1 / (i + 1) for i in range(40)], k=length))
    return text[:length]


class Definition:
    """p_n(c | context) by the definition, in fractions, with every gram looked for in the whole text."""

    def __init__(self, text, n):
        self.text, self.longest = text, n

    def count(self, gram):
        places = [i for i in range(len(self.text)) if self.text.startswith(gram, i)]
        if len(gram) == self.longest:
            return len(places)
        return len({self.text[i - 1] for i in places if i > 0})

    def discounts(self, n):
        counts = [self.count(gram) for gram in {self.text[i : i + n] for i in range(len(self.text) - n + 1)}]
        n1, n2, n3, n4 = (counts.count(j) for j in (1, 2, 3, 4))
        Y = Fraction(n1, n1 + 2 * n2) if n1 else Fraction(1, 2)
        if n1 * n2 * n3:
            D = [1 - 2 * Y * n2 / n1, 2 - 3 * Y * n3 / n2, 3 - 4 * Y * n4 / n3]
            if 0 < D[0] <= 1 and 0 < D[1] <= 2 and 0 < D[2] <= 3:
                return D
        return [Y, Y, Y]

    def p(self, n, context):
        """{letter: p} after the n - 1 letters of context."""
        shorter = self.p(n - 1, context[1:]) if n > 1 else dict.fromkeys(LETTERS, Fraction(1, V))
        counts = {letter: self.count(context + letter) for letter in LETTERS}
        if not any(counts.values()):
            return shorter
        D = self.discounts(n)
        lost = {letter: D[min(count, 3) - 1] if count else 0 for letter, count in counts.items()}
        return {
            letter: (counts[letter] - lost[letter] + sum(lost.values()) * shorter[letter])
            / sum(counts.values())
            for letter in LETTERS
        }


def contexts(text, n):
    """n - 1 letters each: of the text, its end among them, and others, seen or not."""
    draw = random.Random(1)
    others = ["".join(draw.choices(LETTERS, k=n - 1)) for _ in range(8)]
    places = (0, 1, len(text) // 2, len(text) - n + 1)
    return list(dict.fromkeys([*others, *(text[i : i + n - 1] for i in places)]))


# In the second the three discounts exist for n = 3 and 4, in the last two for no n.
@pytest.mark.parametrize("text", [TEXT, random_text(400), "abcabcabcabcabcabc", "abcdr"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_probabilities_are_the_definitions(text, n):
    model, definition = NGram(ids(text), V, n), Definition(text, n)
    for context in contexts(text, n):
        for letter, truth in definition.p(n, context).items():
            p = model.probability(ids(context), *ids(letter))
            assert p == pytest.approx(float(truth), rel=1e-12), (context, letter)


def test_the_text_has_three_discounts_of_its_own():
    discounts = [tuple(order.discounts) for order in NGram(ids(random_text(400)), V, 4).orders]
    assert [len(set(D)) for D in discounts] == [2, 4, 4, 4]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("text", [TEXT, random_text(3000), "abcabcabcabc", "ababa", "aaaaaa"])
def test_probabilities_sum_to_one_and_none_is_zero(text, n):
    model = NGram(ids(text), V, n)
    never = [V - 1] * (n - 1)
    for context in [never, [], *(ids(context) for context in contexts(text, n))]:
        p = [model.probability(context, c) for c in range(V)]
        assert min(p) > 0
        assert math.fsum(p) == pytest.approx(1, rel=1e-12)


def test_the_held_out_text_goes_on_where_the_text_ended():
    text, held = random_text(400), random_text(60, seed=5)
    model, both = NGram(ids(text), V, 4), ids(text + held)
    bits = [-math.log2(model.probability(both[:i], both[i])) for i in range(len(text), len(both))]
    assert model.bits_per_character(ids(held)) == pytest.approx(sum(bits) / len(held), rel=1e-12)


def test_only_the_last_of_a_long_context_counts():
    model = NGram(ids(TEXT), V, 3)
    assert model.probability(ids("rrrrab"), 2) == model.probability(ids("ab"), 2)
    assert model.probability(ids("ab"), 2) != model.probability(ids("rb"), 2)


def test_a_text_that_repeats_is_predicted():
    text = "bad cab card " * 40
    held = ids("bad cab card " * 4)
    assert NGram(ids(text), V, 5).bits_per_character(held) < 0.05
    assert NGram(ids(text), V, 1).bits_per_character(held) > 2


def test_unigram_is_the_characters_shares_with_discounts():
    # 8 a, 3 b, 2 c and 2 d, 1 r: n1 = 1, n2 = 2, n3 = 1, so D1 = 1/5, D2 = 2 - 3/5 * 1/2, D3 = 3.
    model = NGram(ids("aaaaaaaabbbccddr"), V, 1)
    D1, D2, D3 = 1 / 5, 2 - 3 / 5 * 1 / 2, 3
    rest = (2 * D3 + 2 * D2 + D1) / V
    expected = [8 - D3, 3 - D3, 2 - D2, 2 - D2, 1 - D1, 0, 0, 0]
    p = [model.probability([], c) for c in range(V)]
    assert p == pytest.approx([(share + rest) / 16 for share in expected], rel=1e-12)
    assert model.bits_per_character([0, 6]) == pytest.approx(-(math.log2(p[0]) + math.log2(p[6])) / 2)


@pytest.mark.parametrize("n", [1, 5])
def test_characters_never_seen_cost_something_finite(n):
    model = NGram(ids(TEXT), V, n)
    assert math.log2(V) < model.bits_per_character([V - 1, V - 2, V - 1]) < 20


def test_tensors_are_lists():
    text, held = random_text(400), random_text(60, seed=5)
    expected = NGram(ids(text), V, 5).bits_per_character(ids(held))
    model = NGram(torch.tensor(ids(text)), V, 5)
    assert model.bits_per_character(torch.tensor(ids(held))) == expected
    assert model.probability(torch.tensor([0, 1]), 2) == model.probability([0, 1], 2)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: NGram([], V, 1), r"text has 0 characters; expected at least n = 1: take a longer text"),
        (lambda: NGram([0, 1, 2, 3], V, 5), r"text has 4 characters; expected at least n = 5"),
        (lambda: NGram([0, V], V, 1), rf"text has the id {V}; expected 0 to {V - 1}, as V is {V}"),
        (lambda: NGram([0, -1], V, 1), r"text has the id -1; expected"),
        (lambda: NGram([0, 1], V, 0), r"n is 0; expected at least 1"),
        (lambda: NGram([0, 1], 0, 1), r"V is 0; expected at least 1"),
        (lambda: NGram([0, 1], V, 1).bits_per_character([]), r"held_out is empty; expected at least one"),
        (lambda: NGram([0, 1], V, 1).bits_per_character([V]), rf"held_out has the id {V}; expected"),
        (lambda: NGram([0, 1], V, 1).probability([], V), rf"c has the id {V}; expected"),
        (lambda: NGram([0, 1], V, 1).probability([V], 0), rf"context has the id {V}; expected"),
    ],
)
def test_errors_are_sentences(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
