"""A closed descriptor names its peer, although descriptors are reused at once."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from zmqcluster.runtime.connections import Connections


def peer(number: int) -> bytes:
    return b"\0" + (number % 2**32).to_bytes(4)


A, B = peer(1), peer(2)


def with_a_at_13() -> Connections:
    connections = Connections()
    connections.accepted(13)
    connections.heard(A, 13)
    return connections


def test_closed_descriptor_names_the_peer_that_spoke_through_it_once() -> None:
    connections = with_a_at_13()

    connections.disconnected(13)

    assert connections.take_lost() == [A]
    assert connections.take_lost() == []
    assert len(connections) == 0


def test_peer_that_never_spoke_is_nobodys_loss() -> None:
    connections = Connections()
    connections.accepted(13)

    connections.disconnected(13)

    assert connections.take_lost() == []


def test_reused_descriptor_keeps_the_new_peer_and_loses_the_old() -> None:
    connections = with_a_at_13()

    connections.disconnected(13)
    connections.accepted(13)
    connections.heard(B, 13)

    assert connections.take_lost() == [A]
    assert connections.knows(B, 13)


def test_late_words_of_the_old_peer_do_not_cost_the_new_one() -> None:
    connections = with_a_at_13()
    connections.disconnected(13)
    connections.accepted(13)
    connections.heard(B, 13)
    connections.take_lost()

    connections.heard(A, 13)

    assert connections.take_lost() == [A]
    assert connections.knows(B, 13)


def test_numbers_of_peers_wrap_around() -> None:
    connections = Connections()
    connections.accepted(13)
    connections.heard(peer(2**32 - 1), 13)
    connections.disconnected(13)
    connections.accepted(13)

    connections.heard(peer(2**32), 13)
    connections.heard(peer(2**32 - 1), 13)

    assert connections.knows(peer(0), 13)
    assert set(connections.take_lost()) == {peer(2**32 - 1)}


def test_peer_that_spoke_and_went_before_we_listened_is_lost() -> None:
    connections = Connections()
    connections.accepted(13)
    connections.disconnected(13)

    connections.heard(A, 13)

    assert connections.take_lost() == [A]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), max_size=30), st.randoms())
def test_read_in_any_order_no_living_speaker_is_lost_and_no_dead_one_is_kept(
    steps: list[tuple[int, int]], rng: random.Random
) -> None:
    """World: two descriptors; a step closes what is open there, opens anew, and may speak."""
    connections = Connections()
    numbers = iter(range(100, 1000))
    living: dict[int, bytes] = {}
    unread: list[tuple[bytes, int]] = []
    spoke: set[bytes] = set()
    lost: set[bytes] = set()
    for descriptor, words in steps:
        if descriptor in living:
            del living[descriptor]
            connections.disconnected(descriptor)
        living[descriptor] = peer(next(numbers))
        connections.accepted(descriptor)
        unread += [(living[descriptor], descriptor)] * words
        random.shuffle(unread)
        while unread and rng.random() < 0.5:
            who, where = unread.pop()
            spoke.add(who)
            if not connections.knows(who, where):
                connections.heard(who, where)
        lost |= set(connections.take_lost())

    assert lost.isdisjoint(living.values())
    for descriptor in list(living):
        connections.disconnected(descriptor)
    assert spoke <= lost | set(connections.take_lost())
