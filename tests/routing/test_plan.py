"""Is the plan a function of the route, the fleet and the tie-break, and of nothing else?"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.ladder import Ladder, Route, Rung, Seat
from routing.plan import PlannedAttempt, make_plan


def route(*seats: int) -> Route:
    """A route with so many backends at each tier."""
    return Route(
        name="auto",
        rungs=tuple(
            Rung(
                f"t{rung}", tuple(Seat(f"t{rung}b{seat}", f"m{rung}") for seat in range(number)), 0.5 if rung else None
            )
            for rung, number in enumerate(seats)
        ),
    )


def backends(attempts: tuple[PlannedAttempt, ...]) -> list[str]:
    return [attempt.backend for attempt in attempts]


def test_tiers_come_cheapest_first_with_every_backend_of_each() -> None:
    plan = make_plan(route(2, 1, 2), choices=1, down=frozenset(), tie_break=0)
    assert backends(plan.attempts) == ["t0b0", "t0b1", "t1b0", "t2b0", "t2b1"]
    assert plan.last_resort == ()


def test_an_attempt_carries_what_its_rung_says() -> None:
    plan = make_plan(route(1, 1), choices=3, down=frozenset(), tie_break=0)
    assert plan.attempts[1] == PlannedAttempt(rung=1, tier="t1", backend="t1b0", model="m1", doubt_below=0.5)
    assert plan.attempts[0].doubt_below is None
    assert plan.choices == 3


def test_what_is_believed_dead_is_a_last_resort_in_the_same_order() -> None:
    plan = make_plan(route(2, 2), choices=1, down={"t0b0", "t1b1", "stranger"}, tie_break=0)
    assert backends(plan.attempts) == ["t0b1", "t1b0"]
    assert backends(plan.last_resort) == ["t0b0", "t1b1"]


@pytest.mark.parametrize(
    ("tie_break", "expected"), [(0, [0, 1, 2]), (1, [1, 2, 0]), (2, [2, 0, 1]), (3, [0, 1, 2]), (-1, [2, 0, 1])]
)
def test_the_tie_break_turns_the_backends_of_a_tier(tie_break: int, expected: list[int]) -> None:
    plan = make_plan(route(3), choices=1, down=frozenset(), tie_break=tie_break)
    assert backends(plan.attempts) == [f"t0b{seat}" for seat in expected]


def test_the_tie_break_spreads_the_load_evenly() -> None:
    firsts = Counter(
        make_plan(route(4), choices=1, down=frozenset(), tie_break=number).attempts[0].backend for number in range(400)
    )
    assert set(firsts.values()) == {100}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data(), st.integers())
def test_every_backend_is_planned_exactly_once_and_tiers_never_mix(
    seats: list[int], data: st.DataObject, tie_break: int
) -> None:
    asked = route(*seats)
    names = [seat.backend for rung in asked.rungs for seat in rung.seats]
    down = data.draw(st.sets(st.sampled_from(names)))
    plan = make_plan(asked, choices=1, down=down, tie_break=tie_break)
    assert sorted(backends(plan.attempts) + backends(plan.last_resort)) == sorted(names)
    assert set(backends(plan.last_resort)) == down
    for attempts in (plan.attempts, plan.last_resort):
        rungs = [attempt.rung for attempt in attempts]
        assert rungs == sorted(rungs)
    assert plan == make_plan(asked, choices=1, down=down, tie_break=tie_break)


def test_a_route_is_judged_if_any_of_its_answers_can_be_doubted() -> None:
    assert route(1, 1).judged
    assert not route(1).judged


def test_a_ladder_knows_its_names_and_no_others() -> None:
    auto = route(1)
    ladder = Ladder({"auto": auto, "org/model-7b": auto})
    assert ladder.find("org/model-7b") is auto
    assert ladder.find("Auto") is None
    assert ladder.find("") is None
