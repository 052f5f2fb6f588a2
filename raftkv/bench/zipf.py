"""Zipfian ranks: rank r of n is drawn with a probability in proportion to 1 / r^theta.

Exactly so, by rejection-inversion (Hörmann and Derflinger, "Rejection-inversion to generate variates from monotone
discrete distributions", 1996): no table, so the number of ranks may change from one draw to the next.
"""

from __future__ import annotations

import math
import random

YCSB_THETA = 0.99
"""Of YCSB ("Benchmarking cloud serving systems with YCSB", 2010)."""


class Zipf:
    """Draws ranks; `theta` is above 0 and not 1."""

    def __init__(self, theta: float = YCSB_THETA) -> None:
        assert theta > 0
        assert theta != 1
        self._theta = theta
        self._power = 1 - theta
        self._low = self._integral(1.5) - 1
        self._squeeze = 2 - self._inverse(self._integral(2.5) - 2**-theta)

    def draw(self, rng: random.Random, ranks: int) -> int:
        """From 0, the most frequent one, to `ranks` - 1."""
        high = self._integral(ranks + 0.5)
        while True:
            area = high + rng.random() * (self._low - high)
            x = self._inverse(area)
            rank = min(max(int(x + 0.5), 1), ranks)
            if rank - x <= self._squeeze or area >= self._integral(rank + 0.5) - rank**-self._theta:
                return rank - 1

    def _integral(self, x: float) -> float:
        """Of 1 / x^theta, from 1."""
        return math.expm1(self._power * math.log(x)) / self._power

    def _inverse(self, area: float) -> float:
        return math.exp(math.log1p(self._power * area) / self._power)


class Scrambled:
    """Zipfian draws whose frequent numbers are spread over all of [0, `numbers`): each rank has one number of its own.

    (YCSB hashes the rank instead, so that some numbers get two ranks and others none.)
    """

    def __init__(self, numbers: int, theta: float = YCSB_THETA) -> None:
        self._numbers = numbers
        self._zipf = Zipf(theta)
        self._step = next(step for step in range(int(numbers * 0.618) + 1, 2 * numbers + 1) if _coprime(step, numbers))

    def draw(self, rng: random.Random) -> int:
        return self.number_of(self._zipf.draw(rng, self._numbers))

    def number_of(self, rank: int) -> int:
        """The number that has this rank."""
        return (rank * self._step + self._numbers // 3) % self._numbers


def _coprime(a: int, b: int) -> bool:
    return math.gcd(a, b) == 1
