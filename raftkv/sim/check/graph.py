"""Directed graphs with labelled edges: strongly connected components, and short cycles through given edges.

Pure and deterministic: everything is visited in the order in which it was added.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import pairwise
from typing import Final, NamedTuple


class Label(IntEnum):
    """Why one transaction comes before another; several reasons can hold at once: an int has their bits."""

    WW = 1  # the second overwrote (here: appended after) what the first wrote
    WR = 2  # the second read what the first wrote
    RW = 4  # the first read a state that the second then changed
    RT = 8  # the first returned before the second was called


class Edge(NamedTuple):
    source: int
    target: int
    label: Label  # of those it has, the one that is meant


class Graph:
    """Nodes are 0…n-1."""

    def __init__(self, nodes: int) -> None:
        self.successors: list[dict[int, int]] = [{} for _ in range(nodes)]

    def add(self, source: int, target: int, label: Label) -> None:
        """Add a reason for source → target; a node is never before itself."""
        if source != target:
            labels = self.successors[source]
            labels[target] = labels.get(target, 0) | label

    def edges(self, label: Label) -> Iterator[tuple[int, int]]:
        """All edges that have `label`."""
        for source, targets in enumerate(self.successors):
            for target, labels in targets.items():
                if labels & label:
                    yield source, target

    def components(self, allowed: int) -> list[int]:
        """The component of each node, by its number, along edges with any `allowed` label (Tarjan, iterative).

        -1 for a node that is a component by itself.
        """
        count = len(self.successors)
        index = [-1] * count
        low = [0] * count
        on_stack = [False] * count
        component = [-1] * count
        stack: list[int] = []
        visited = found = 0
        for root in range(count):
            if index[root] >= 0:
                continue
            work = [(root, iter(self.successors[root].items()))]
            index[root] = low[root] = visited
            visited += 1
            stack.append(root)
            on_stack[root] = True
            while work:
                node, targets = work[-1]
                for target, labels in targets:
                    if not labels & allowed:
                        continue
                    if index[target] < 0:
                        index[target] = low[target] = visited
                        visited += 1
                        stack.append(target)
                        on_stack[target] = True
                        work.append((target, iter(self.successors[target].items())))
                        break
                    if on_stack[target]:
                        low[node] = min(low[node], index[target])
                else:
                    work.pop()
                    if work:
                        parent = work[-1][0]
                        low[parent] = min(low[parent], low[node])
                    if low[node] == index[node]:
                        members = _pop_until(stack, node)
                        for member in members:
                            on_stack[member] = False
                            component[member] = found if len(members) > 1 else -1
                        found += 1
        return component

    def path(self, start: int, goal: int, allowed: int, component: Sequence[int]) -> list[int] | None:
        """A shortest path of nodes from start to goal, over `allowed` edges inside start's component."""
        came_from = {start: start}
        queue = deque([start])
        while queue:
            node = queue.popleft()
            if node == goal:
                return _walk_back(came_from, start, goal)
            for target, labels in self.successors[node].items():
                if labels & allowed and target not in came_from and component[target] == component[start]:
                    came_from[target] = node
                    queue.append(target)
        return None

    def cycle_through(self, edges: Iterable[tuple[int, int]], first: Label, allowed: int) -> list[Edge] | None:
        """A short cycle that begins with one of `edges`, as `first`, and goes on over `allowed` ones."""
        component = self.components(first | allowed)
        best: list[Edge] | None = None
        tried = 0
        for source, target in edges:
            if component[source] < 0 or component[source] != component[target]:
                continue
            nodes = self.path(target, source, allowed, component)
            tried += 1
            if nodes is not None:
                cycle = [Edge(source, target, first), *self._labelled(nodes, allowed)]
                if best is None or len(cycle) < len(best):
                    best = cycle
            if tried >= EDGES_TRIED_MAX or (best is not None and (len(best) == 2 or tried >= SHORTER_TRIED_MAX)):
                break
        return best

    def _labelled(self, nodes: list[int], allowed: int) -> Iterator[Edge]:
        for source, target in pairwise(nodes):
            labels = self.successors[source][target] & allowed
            yield Edge(source, target, next(label for label in Label if labels & label))


SHORTER_TRIED_MAX: Final = 200
"""Once one cycle is known, this many edges at most are tried for a shorter one."""

EDGES_TRIED_MAX: Final = 2000
"""So many edges are tried for a first cycle. If all edges of the component are allowed, the first has one."""


def _pop_until(stack: list[int], node: int) -> list[int]:
    members: list[int] = []
    while True:
        members.append(stack.pop())
        if members[-1] == node:
            return members


def _walk_back(came_from: dict[int, int], start: int, goal: int) -> list[int]:
    nodes = [goal]
    while nodes[-1] != start:
        nodes.append(came_from[nodes[-1]])
    return nodes[::-1]
