"""Whose turn it is: priority, then teams in turn, then age."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from itertools import pairwise
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from policies.turns import Turns

_T = TypeVar("_T", bound=Hashable)


def drain(turns: Turns[_T]) -> list[_T]:
    order = []
    while (first := turns.first()) is not None:
        turns.leave(first, served=True)
        order.append(first)
    return order


def line(*waiters: tuple[str, int, str]) -> Turns[str]:
    turns: Turns[str] = Turns()
    for name, priority, team in waiters:
        turns.add(name, priority=priority, team=team)
    return turns


def test_nobody_waits() -> None:
    assert line().first() is None


def test_the_oldest_of_a_team_goes_first() -> None:
    assert drain(line(("a", 0, "x"), ("b", 0, "x"), ("c", 0, "x"))) == ["a", "b", "c"]


def test_a_higher_priority_goes_before_an_older_one() -> None:
    assert drain(line(("old", 0, "x"), ("urgent", 5, "x"), ("later", -1, "x"))) == ["urgent", "old", "later"]


def test_a_team_with_many_gets_no_more_turns_than_one_with_few() -> None:
    turns = line(*((f"x{n}", 0, "x") for n in range(4)), ("y0", 0, "y"), ("z0", 0, "z"), ("y1", 0, "y"))
    assert drain(turns) == ["x0", "y0", "z0", "x1", "y1", "x2", "x3"]


def test_who_leaves_unserved_takes_no_turn_of_the_team() -> None:
    turns = line(("x0", 0, "x"), ("x1", 0, "x"), ("y0", 0, "y"))
    turns.leave("x0", served=False)
    assert drain(turns) == ["x1", "y0"]


def test_leaving_twice_does_no_harm() -> None:
    turns = line(("a", 0, "x"), ("b", 0, "x"))
    turns.leave("a", served=True)
    turns.leave("a", served=True)
    assert drain(turns) == ["b"]


def test_how_many_are_ahead() -> None:
    turns = line(("a", 0, "x"), ("b", 5, "x"), ("c", -5, "y"))
    assert [turns.ahead_of(priority) for priority in (9, 5, 0, -9)] == [0, 1, 2, 3]


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from("xyz")), max_size=30))
def test_each_is_served_once_and_no_team_twice_while_another_of_its_priority_waits(
    places: list[tuple[int, str]],
) -> None:
    turns: Turns[tuple[int, int, str]] = Turns()
    for number, (priority, team) in enumerate(places):
        turns.add((number, priority, team), priority=priority, team=team)
    order = drain(turns)
    assert sorted(order) == sorted((number, *place) for number, place in enumerate(places))
    assert [one[1] for one in order] == sorted((one[1] for one in order), reverse=True)
    left = Counter((priority, team) for _, priority, team in order)
    for before, after in pairwise(order):
        left[before[1:]] -= 1
        others = any(count and key[0] == before[1] and key != before[1:] for key, count in left.items())
        assert not (before[1:] == after[1:] and others)
