"""Whom to ask next: the leader, a hint, the others in turn, suspects last."""

from __future__ import annotations

import random

from raftkv.client.replicas import SILENT_S, SUSPECT_S, Replicas

A, B, C = "a:1", "b:2", "c:3"


def group() -> Replicas:
    replicas = Replicas("shardkv", 2, (A, B, C), random.Random(1))
    while replicas.pick(0.0) != A:
        replicas.not_leader(replicas.pick(0.0), None, 0.0)
    return replicas


def test_clients_begin_with_different_replicas() -> None:
    firsts = {Replicas("shardkv", 1, (A, B, C), random.Random(n)).pick(0.0) for n in range(20)}
    assert firsts == {A, B, C}


def test_the_leader_is_remembered() -> None:
    replicas = group()
    replicas.answered(C)
    assert [replicas.pick(0.0) for _ in range(3)] == [C, C, C]


def test_a_hint_is_followed_even_to_an_address_outside_the_map() -> None:
    replicas = group()
    replicas.not_leader(A, B, 0.0)
    assert replicas.pick(0.0) == B
    replicas.not_leader(B, "d:4", 0.0)
    assert replicas.pick(0.0) == "d:4"
    replicas.failed("d:4", 0.0, silent=False)
    assert replicas.pick(0.0) in (A, B, C)


def test_without_a_hint_it_is_the_next_ones_turn() -> None:
    replicas = group()
    order = []
    for _ in range(4):
        order.append(replicas.pick(0.0))
        replicas.not_leader(order[-1], None, 0.0)
    assert order == [A, B, C, A]


def test_many_requests_that_fail_at_once_move_on_once() -> None:
    replicas = group()
    replicas.answered(A)
    for _ in range(64):
        replicas.failed(A, 0.0, silent=False)
    assert replicas.pick(0.0) == B


def test_late_news_of_an_old_leader_does_not_unseat_the_new_one() -> None:
    replicas = group()
    replicas.answered(B)
    replicas.failed(A, 0.0, silent=False)
    replicas.not_leader(C, None, 0.0)
    assert replicas.pick(0.0) == B


def test_a_suspect_is_not_asked_for_a_while_nor_by_a_hint() -> None:
    replicas = group()
    replicas.answered(A)
    replicas.failed(A, 0.0, silent=False)
    replicas.not_leader(B, A, 0.1)
    assert replicas.pick(0.1) == C
    replicas.not_leader(C, A, 0.2)
    assert replicas.pick(0.2) in (B, C)
    replicas.not_leader(B, A, SUSPECT_S + 0.01)
    assert replicas.pick(SUSPECT_S + 0.01) == A


def test_when_all_are_suspect_the_oldest_suspicion_is_tried() -> None:
    replicas = group()
    for now, address in enumerate((B, A, C)):
        replicas.failed(address, 0.01 * now, silent=address == B)
    assert replicas.pick(0.05) == A  # B was silent: it is left alone for longer
    assert SILENT_S > SUSPECT_S


def test_reads_of_followers_go_round() -> None:
    replicas = group()
    assert sorted(replicas.pick_any(0.0) for _ in range(3)) == [A, B, C]
    replicas.failed(B, 0.0, silent=False)
    assert B not in [replicas.pick_any(0.1) for _ in range(6)]
