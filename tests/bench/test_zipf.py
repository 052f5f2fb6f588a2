"""Zipfian draws against the formula."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from raftkv.bench.zipf import Scrambled, Zipf

DRAWS = 100_000
SIGMAS = 4.5


def probabilities(ranks: int, theta: float) -> list[float]:
    weights = [rank**-theta for rank in range(1, ranks + 1)]
    return [weight / sum(weights) for weight in weights]


def check(counts: Counter[int], expected: list[float]) -> None:
    """Each rank that is frequent enough, and the tail as a whole, is drawn as often as it should be."""
    assert counts.total() == DRAWS
    frequent = [rank for rank, probability in enumerate(expected) if probability * DRAWS >= 200]
    shares = [(counts[rank], expected[rank]) for rank in frequent]
    shares.append((DRAWS - sum(count for count, _ in shares), 1 - sum(probability for _, probability in shares)))
    for count, probability in shares:
        sigma = (DRAWS * probability * (1 - probability)) ** 0.5
        assert abs(count - DRAWS * probability) <= SIGMAS * sigma + 1e-6


@pytest.mark.parametrize(("ranks", "theta"), [(1, 0.99), (2, 0.99), (3, 0.5), (1_000, 0.99), (50, 1.5)])
def test_ranks_are_as_frequent_as_the_formula_says(ranks: int, theta: float) -> None:
    rng = random.Random(1)
    zipf = Zipf(theta)
    check(Counter(zipf.draw(rng, ranks) for _ in range(DRAWS)), probabilities(ranks, theta))


@pytest.mark.parametrize("numbers", [1, 2, 10, 997, 10_000])
def test_scrambling_gives_every_rank_a_number_of_its_own(numbers: int) -> None:
    scrambled = Scrambled(numbers)
    assert sorted(scrambled.number_of(rank) for rank in range(numbers)) == list(range(numbers))


def test_scrambled_numbers_are_as_frequent_as_their_ranks_and_far_apart() -> None:
    rng = random.Random(2)
    scrambled = Scrambled(1_000)
    rank_of = {scrambled.number_of(rank): rank for rank in range(1_000)}
    check(Counter(rank_of[scrambled.draw(rng)] for _ in range(DRAWS)), probabilities(1_000, 0.99))
    hottest = sorted(scrambled.number_of(rank) for rank in range(10))
    assert min(after - before for before, after in itertools.pairwise(hottest)) > 10


def test_the_same_seed_draws_the_same() -> None:
    first, second = ([Zipf().draw(random.Random(7), 100) for _ in range(5)] for _ in range(2))
    assert first == second
