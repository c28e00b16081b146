"""Does every climb end as it should? Commands out, events in: plays without a loop, a clock or a network."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.cascade import (
    Cancel,
    Climb,
    Command,
    Commit,
    Due,
    Ending,
    Event,
    Finished,
    Keep,
    Left,
    Outcome,
    Progress,
    Start,
    WakeAt,
    climb,
)
from routing.confidence import ChoiceSignals, Signals
from routing.ladder import Hold, Route, Rung, Seat
from routing.plan import PlannedAttempt, RoutePlan, make_plan

SURE, UNSURE = 0.9, 0.1
NAMES = ("small", "medium", "large", "giant")


def said(*confidences: float | None, tokens: int = 3, reasoning: int = 0, finished: bool = False) -> Signals:
    """Signals of one choice for each confidence; None: text without log-probabilities."""
    return {
        index: ChoiceSignals(
            scored_tokens=0 if one is None else tokens,
            logprob_sum=0.0 if one is None else tokens * log(one),
            pieces=tokens,
            reasoning_pieces=reasoning,
            finished=finished,
        )
        for index, one in enumerate(confidences)
    }


def near(confidence: float) -> Any:
    return pytest.approx(confidence)


THINKING: Signals = {0: ChoiceSignals(reasoning_pieces=50)}


class Play:
    """A climb on the stage: what was ordered is compared with `asks`, what happens is told by the other methods."""

    def __init__(
        self,
        *thresholds: float | None,
        seats: int = 1,
        down: frozenset[str] = frozenset(),
        choices: int = 1,
        hold: Hold | None = None,
        keep_doubted: bool = True,
        doubt_unknown: bool = True,
    ) -> None:
        rungs = tuple(
            Rung(tier, tuple(Seat(f"{tier}{seat}", tier) for seat in range(seats)), threshold)
            for tier, threshold in zip(NAMES, thresholds, strict=False)
        )
        route = Route(
            name="auto",
            rungs=rungs,
            hold=hold or Hold(tokens=3, time_s=2.0, size_bytes=1000),
            keep_doubted=keep_doubted,
            doubt_unknown=doubt_unknown,
        )
        self.plan = make_plan(route, choices=choices, down=down, tie_break=0)
        self.ending: Ending | None = None
        self._climb: Climb = climb(self.plan)
        self._said: tuple[Command, ...] = ()
        self._go(None)

    def _go(self, event: Event | None) -> None:
        assert self.ending is None, "the climb is over"
        try:
            self._said = next(self._climb) if event is None else self._climb.send(event)
        except StopIteration as stop:
            ending: Ending = stop.value
            self.ending, self._said = ending, ending.last

    def asks(self, *expected: Command) -> None:
        """Compare what was ordered. An alarm that is set on the way counts only where one is expected."""
        alarms = any(isinstance(one, WakeAt) for one in expected)
        assert tuple(one for one in self._said if alarms or not isinstance(one, WakeAt)) == expected

    def starts(self, id_: int, backend: str) -> PlannedAttempt:
        """The only thing ordered is the start of this attempt."""
        (command,) = [one for one in self._said if not isinstance(one, WakeAt)]
        assert isinstance(command, Start)
        assert (command.id, command.attempt.backend) == (id_, backend)
        return command.attempt

    def says(self, id_: int, signals: Signals, *, at: float = 0.0, held: int = 10) -> None:
        self._go(Progress(id_, signals, held, at))

    def ends(self, id_: int, outcome: Outcome = "completed", signals: Signals | None = None, *, at: float = 0) -> None:
        self._go(Finished(id_, outcome, signals if signals is not None else {}, at))

    def wakes(self, at: float) -> None:
        self._go(Due(at))

    def leaves(self) -> None:
        self._go(Left(0.0))

    def is_over(self, kind: str, *outcomes: str, committed: int | None = None, degraded: bool = False) -> Ending:
        ending = self.ending
        assert ending is not None
        assert (ending.kind, ending.committed, ending.degraded) == (kind, committed, degraded)
        assert tuple(one.outcome for one in ending.judged) == outcomes
        return ending


def start(play: Play, id_: int, number: int) -> Start:
    return Start(id_, play.plan.attempts[number])


# -- one tier ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_cannot_be_doubted_is_committed_with_its_first_token() -> None:
    play = Play(None)
    play.starts(1, "small0")
    play.says(1, said(UNSURE, tokens=1))
    play.asks(Commit(1, near(UNSURE), degraded=False))
    play.ends(1)
    play.is_over("answered", "completed", committed=1)


def test_a_sure_answer_is_committed_when_enough_of_it_is_held() -> None:
    play = Play(0.5, None)
    play.starts(1, "small0")
    play.says(1, said(SURE, tokens=1), at=10.0)
    play.asks(WakeAt(12.0))
    play.says(1, said(SURE, tokens=2), at=10.1)
    play.asks()
    play.says(1, said(SURE, tokens=3), at=10.2)
    play.asks(Commit(1, near(SURE), degraded=False))
    play.ends(1)
    ending = play.is_over("answered", "completed", committed=1)
    assert ending.judged[0].confidence == near(SURE)
    assert not ending.judged[0].doubted


def test_an_answer_exactly_as_sure_as_the_threshold_is_accepted() -> None:
    play = Play(1.0, None)
    play.ends(1, signals=said(1.0, finished=True))
    play.asks(Commit(1, 1.0, degraded=False))


def test_a_short_answer_is_judged_when_it_is_complete() -> None:
    play = Play(0.5, None)
    play.ends(1, signals=said(SURE, tokens=1, finished=True))
    play.asks(Commit(1, near(SURE), degraded=False))
    play.is_over("answered", "completed", committed=1)


def test_a_committed_answer_that_breaks_off_is_broken_and_nothing_else_is_tried() -> None:
    play = Play(0.5, None, seats=2)
    play.says(1, said(SURE))
    play.ends(1, "failed")
    play.asks()
    play.is_over("broken", "failed", committed=1)


# -- doubt ------------------------------------------------------------------------------------------------------------


def test_a_doubted_answer_is_kept_until_the_next_tier_has_its_first_token() -> None:
    play = Play(0.5, 0.5)
    play.says(1, said(UNSURE))
    play.asks(Keep(1), start(play, 2, 1))
    play.says(2, said(SURE, tokens=1), at=5.0)
    play.asks(Cancel(1), WakeAt(7.0))
    play.ends(1, "cancelled")
    play.says(2, said(SURE), at=5.1)
    play.asks(Commit(2, near(SURE), degraded=False))
    play.ends(2)
    ending = play.is_over("answered", "cancelled", "completed", committed=2)
    assert [one.doubted for one in ending.judged] == [True, False]
    assert ending.judged[0].confidence == near(UNSURE)


def test_a_doubt_goes_to_the_next_tier_and_not_to_the_next_backend() -> None:
    play = Play(0.5, None, seats=2)
    play.says(1, said(UNSURE))
    play.asks(Keep(1), start(play, 2, 2))
    assert play.plan.attempts[2].tier == "medium"


def test_a_complete_doubted_answer_costs_nothing_and_is_not_cancelled() -> None:
    play = Play(0.5, None)
    play.ends(1, signals=said(UNSURE, finished=True))
    play.starts(2, "medium0")
    play.says(2, said(UNSURE, tokens=1))
    play.asks(Commit(2, near(UNSURE), degraded=False))
    play.ends(2)
    play.is_over("answered", "completed", "completed", committed=2)


def test_when_every_tier_above_fails_the_kept_answer_is_served_and_goes_on_as_degraded() -> None:
    play = Play(0.5, 0.5, None)
    play.says(1, said(UNSURE))
    play.asks(Keep(1), start(play, 2, 1))
    play.ends(2, "failed")
    play.starts(3, "large0")
    play.ends(3, "failed")
    play.asks(Commit(1, near(UNSURE), degraded=True))
    play.ends(1)
    play.is_over("answered", "completed", "failed", "failed", committed=1, degraded=True)


def test_the_surest_of_the_kept_answers_is_served() -> None:
    play = Play(0.9, 0.9, 0.9)
    for id_, confidence in ((1, 0.3), (2, 0.8), (3, 0.5)):
        play.ends(id_, signals=said(confidence, finished=True))
    play.asks(Commit(2, near(0.8), degraded=True))
    play.is_over("answered", "completed", "completed", "completed", committed=2, degraded=True)


def test_of_equally_sure_answers_the_cheapest_is_served_and_an_unknown_one_is_the_last() -> None:
    play = Play(0.9, 0.9, 0.9)
    play.ends(1, signals=said(None, finished=True))
    play.ends(2, signals=said(0.5, finished=True))
    play.ends(3, signals=said(0.5, finished=True))
    play.asks(Commit(2, near(0.5), degraded=True))


def test_a_doubt_at_the_top_is_served_at_once_and_says_so() -> None:
    play = Play(0.5, 0.5)
    play.ends(1, "failed")
    play.says(2, said(UNSURE))
    play.asks(Keep(2), Commit(2, near(UNSURE), degraded=True))
    play.ends(2)
    play.is_over("answered", "failed", "completed", committed=2, degraded=True)


def test_a_kept_answer_that_dies_meanwhile_is_not_served() -> None:
    play = Play(0.5, None)
    play.says(1, said(UNSURE))
    play.asks(Keep(1), start(play, 2, 1))
    play.ends(1, "failed")
    play.asks()
    play.ends(2, "failed")
    again = play.starts(3, "small0")
    assert again.doubt_below is None
    play.says(3, said(UNSURE, tokens=1))
    play.asks(Commit(3, near(UNSURE), degraded=True))
    play.ends(3)
    play.is_over("answered", "failed", "failed", "completed", committed=3, degraded=True)


def test_a_kept_answer_that_completes_meanwhile_can_still_be_served() -> None:
    play = Play(0.5, None)
    play.says(1, said(UNSURE))
    play.ends(1)
    play.ends(2, "failed")
    play.asks(Commit(1, near(UNSURE), degraded=True))
    play.is_over("answered", "completed", "failed", committed=1, degraded=True)


def test_once_the_next_tier_has_begun_nothing_is_kept_and_the_cheapest_is_asked_again() -> None:
    play = Play(0.5, 0.5)
    play.says(1, said(UNSURE))
    play.says(2, said(SURE, tokens=1), at=1.0)
    play.asks(Cancel(1), WakeAt(3.0))
    play.ends(2, "failed")
    again = play.starts(3, "small0")
    assert again.doubt_below is None
    play.ends(1, "cancelled")
    play.asks()
    play.says(3, said(UNSURE, tokens=1))
    play.asks(Commit(3, near(UNSURE), degraded=True))
    play.ends(3)
    play.is_over("answered", "cancelled", "failed", "completed", committed=3, degraded=True)


def test_a_cancelled_answer_that_completed_first_is_served_when_nothing_else_can_be() -> None:
    play = Play(0.5, 0.5)
    play.says(1, said(UNSURE))
    play.says(2, said(SURE, tokens=1))
    play.ends(2, "failed")
    play.ends(3, "failed")
    play.asks()
    play.ends(1)
    play.asks(Commit(1, near(UNSURE), degraded=True))
    play.is_over("answered", "completed", "failed", "failed", committed=1, degraded=True)


def test_where_doubted_answers_are_never_kept_the_cheapest_is_asked_again_without_a_threshold() -> None:
    play = Play(0.5, None, keep_doubted=False)
    play.says(1, said(UNSURE))
    play.asks(Cancel(1), start(play, 2, 1))
    play.ends(1, "cancelled")
    play.ends(2, "failed")
    assert play.starts(3, "small0").doubt_below is None
    play.says(3, said(UNSURE, tokens=1))
    play.asks(Commit(3, near(UNSURE), degraded=True))
    play.ends(3)
    play.is_over("answered", "cancelled", "failed", "completed", committed=3, degraded=True)


def test_where_doubted_answers_are_never_kept_a_complete_one_is_served_all_the_same() -> None:
    play = Play(0.5, None, keep_doubted=False)
    play.ends(1, signals=said(UNSURE, finished=True))
    play.starts(2, "medium0")
    play.ends(2, "failed")
    play.asks(Commit(1, near(UNSURE), degraded=True))
    play.is_over("answered", "completed", "failed", committed=1, degraded=True)


def test_where_the_doubted_backend_has_died_the_rest_of_its_tier_is_asked() -> None:
    play = Play(0.5, None, seats=2, keep_doubted=False)
    play.says(1, said(UNSURE))
    play.ends(1, "cancelled")
    play.ends(2, "failed")
    play.ends(3, "failed")
    play.starts(4, "small0")
    play.ends(4, "failed")
    assert play.starts(5, "small1").doubt_below is None
    play.ends(5, "failed")
    play.is_over("exhausted", "cancelled", "failed", "failed", "failed", "failed")


def test_a_complete_answer_of_the_next_tier_lets_the_kept_one_go_as_well() -> None:
    play = Play(0.5, 0.5, None)
    play.says(1, said(UNSURE))
    play.ends(2, signals=said(UNSURE, finished=True))
    play.asks(Cancel(1), start(play, 3, 2))


def test_a_doubted_answer_is_cancelled_once_only() -> None:
    play = Play(0.5, 0.5)
    play.says(1, said(UNSURE))
    play.says(2, said(SURE, tokens=1))
    play.says(2, said(SURE))
    play.asks(Commit(2, near(SURE), degraded=False))
    play.ends(2)
    play.asks()
    play.ends(1, "cancelled")
    play.is_over("answered", "cancelled", "completed", committed=2)


# -- failures before the commit ---------------------------------------------------------------------------------------


def test_a_failure_before_the_commit_is_passed_over_to_the_next_backend_of_the_tier() -> None:
    play = Play(0.5, None, seats=2)
    play.starts(1, "small0")
    play.ends(1, "failed")
    play.starts(2, "small1")
    play.says(2, said(SURE))
    play.asks(Commit(2, near(SURE), degraded=False))
    play.ends(2)
    play.is_over("answered", "failed", "completed", committed=2)


def test_a_failure_in_the_hold_is_passed_over_too() -> None:
    play = Play(0.5, None)
    play.says(1, said(SURE, tokens=2))
    play.ends(1, "failed")
    play.starts(2, "medium0")


def test_a_refusal_goes_to_the_next_tier_and_not_to_the_next_backend() -> None:
    play = Play(0.5, None, seats=2)
    play.ends(1, "rejected")
    play.starts(2, "medium0")
    play.ends(2, "rejected")
    play.is_over("exhausted", "rejected", "rejected")


def test_when_all_fail_there_is_no_answer() -> None:
    play = Play(0.5, None)
    play.ends(1, "failed")
    play.ends(2, "failed")
    play.asks()
    play.is_over("exhausted", "failed", "failed")


def test_a_plan_of_nothing_is_exhausted_at_once() -> None:
    route = Route(name="auto", rungs=())
    with pytest.raises(StopIteration) as stop:
        next(climb(RoutePlan(route=route, attempts=())))
    assert stop.value.value == Ending(kind="exhausted", judged=())


# -- what is believed dead --------------------------------------------------------------------------------------------


def test_a_backend_believed_dead_is_asked_when_nothing_else_can_answer() -> None:
    play = Play(0.5, None, seats=2, down=frozenset({"small0", "small1", "medium1"}))
    play.starts(1, "medium0")
    play.ends(1, "failed")
    play.starts(2, "small0")
    play.ends(2, "failed")
    play.starts(3, "small1")
    play.says(3, said(SURE))
    play.asks(Commit(3, near(SURE), degraded=False))


def test_a_doubted_answer_is_served_before_what_is_believed_dead_is_waited_for() -> None:
    play = Play(0.5, None, down=frozenset({"medium0"}))
    play.says(1, said(UNSURE))
    play.asks(Keep(1), Commit(1, near(UNSURE), degraded=True))


def test_what_is_believed_dead_is_asked_after_all_when_the_doubted_one_cannot_be_had_again() -> None:
    play = Play(0.5, 0.5, 0.5, keep_doubted=False, down=frozenset({"large0"}))
    play.says(1, said(UNSURE))
    play.ends(1, "cancelled")
    play.ends(2, "failed")
    play.starts(3, "small0")
    play.ends(3, "failed")
    assert play.starts(4, "large0").doubt_below == 0.5
    play.says(4, said(SURE))
    play.asks(Commit(4, near(SURE), degraded=False))


def test_a_tier_that_refused_is_not_asked_at_its_dead_backends() -> None:
    play = Play(None, None, seats=2, down=frozenset({"small1"}))
    play.ends(1, "rejected")
    play.ends(2, "failed")
    play.ends(3, "failed")
    play.is_over("exhausted", "rejected", "failed", "failed")


# -- how much is held -------------------------------------------------------------------------------------------------


def test_when_the_time_of_the_hold_is_up_one_token_is_enough() -> None:
    play = Play(0.5, None)
    play.says(1, said(SURE, tokens=1), at=10.0)
    play.asks(WakeAt(12.0))
    play.wakes(11.9)
    play.asks()
    play.wakes(12.0)
    play.asks(Commit(1, near(SURE), degraded=False))


def test_the_time_of_the_hold_begins_with_the_first_token_and_not_with_the_call() -> None:
    play = Play(0.5, None)
    play.wakes(1000.0)
    play.asks()
    play.says(1, said(SURE, tokens=1), at=1000.0)
    play.asks(WakeAt(1002.0))


def test_a_token_that_comes_after_its_time_is_judged_without_a_new_alarm() -> None:
    play = Play(0.5, None)
    play.says(1, THINKING, at=0.0)
    play.asks(WakeAt(2.0))
    play.wakes(2.0)
    play.asks()
    play.says(1, said(SURE, tokens=1), at=30.0)
    play.asks(Commit(1, near(SURE), degraded=False))


def test_an_alarm_of_an_earlier_attempt_does_not_judge_the_next() -> None:
    play = Play(0.5, 0.5)
    play.says(1, said(UNSURE, tokens=1), at=0.0)
    play.says(1, said(UNSURE), at=1.9)
    play.says(2, said(UNSURE, tokens=1), at=1.95)
    play.wakes(2.0)
    play.asks()


def test_reasoning_alone_is_never_committed_on() -> None:
    play = Play(0.5, None)
    play.says(1, THINKING, at=0.0)
    play.says(1, THINKING, at=100.0)
    play.wakes(200.0)
    play.asks()
    play.says(1, said(SURE, reasoning=50), at=201.0)
    play.asks(Commit(1, near(SURE), degraded=False))


def test_reasoning_that_fills_the_memory_is_a_doubt() -> None:
    play = Play(0.5, None)
    play.says(1, THINKING, held=1000)
    play.asks(Keep(1), start(play, 2, 1))


def test_when_so_many_bytes_are_held_what_is_there_is_judged() -> None:
    play = Play(0.5, None)
    play.says(1, said(SURE, tokens=1), held=999)
    play.asks(WakeAt(2.0))
    play.says(1, said(SURE, tokens=1), held=1000)
    play.asks(Commit(1, near(SURE), degraded=False))


# -- several choices --------------------------------------------------------------------------------------------------


def test_an_attempt_is_as_sure_as_its_least_sure_choice() -> None:
    play = Play(0.5, None, choices=2)
    play.says(1, said(SURE, UNSURE))
    play.asks(Keep(1), start(play, 2, 1))


def test_every_choice_is_waited_for() -> None:
    play = Play(0.5, None, choices=2)
    play.says(1, said(SURE))
    play.asks(WakeAt(2.0))
    play.says(1, {**said(SURE), 1: ChoiceSignals()})
    play.asks()
    play.says(1, {**said(SURE), 1: said(SURE, tokens=2)[0]})
    play.asks()
    play.says(1, said(SURE, SURE))
    play.asks(Commit(1, near(SURE), degraded=False))


def test_a_choice_that_is_finished_needs_no_more_tokens() -> None:
    play = Play(0.5, None, choices=2)
    play.says(1, {**said(SURE), 1: said(SURE, tokens=1, finished=True)[0]})
    play.asks(Commit(1, near(SURE), degraded=False))


def test_when_time_is_up_a_choice_that_has_not_begun_is_not_waited_for() -> None:
    play = Play(0.5, None, choices=2)
    play.says(1, said(SURE))
    play.wakes(2.0)
    play.asks(Commit(1, near(SURE), degraded=False))


# -- unknown confidence -----------------------------------------------------------------------------------------------


def test_an_unknown_confidence_is_a_doubt() -> None:
    play = Play(0.5, None)
    play.says(1, said(None))
    play.asks(Keep(1), start(play, 2, 1))


def test_an_unknown_confidence_is_accepted_where_the_route_says_so() -> None:
    play = Play(0.5, None, doubt_unknown=False)
    play.says(1, said(None))
    play.asks(Commit(1, None, degraded=False))


# -- the client leaves ------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_before_the_commit_ends_every_call() -> None:
    play = Play(0.5, None)
    play.says(1, said(UNSURE))
    play.leaves()
    play.asks(Cancel(1), Cancel(2))
    play.ends(2, "cancelled")
    play.asks()
    play.ends(1, "cancelled")
    play.is_over("abandoned", "cancelled", "cancelled")


def test_a_client_that_leaves_before_the_first_token_ends_the_call() -> None:
    play = Play(None)
    play.leaves()
    play.asks(Cancel(1))
    play.ends(1, "cancelled")
    play.is_over("abandoned", "cancelled")


def test_a_client_that_leaves_after_the_commit_ends_the_call() -> None:
    play = Play(None)
    play.says(1, said(SURE))
    play.leaves()
    play.asks(Cancel(1))
    play.ends(1, "cancelled")
    play.is_over("abandoned", "cancelled", committed=1)


def test_a_client_that_leaves_while_an_answer_is_asked_again_ends_that_too() -> None:
    play = Play(0.5, None, keep_doubted=False)
    play.says(1, said(UNSURE))
    play.ends(1, "cancelled")
    play.ends(2, "failed")
    play.leaves()
    play.asks(Cancel(3))
    play.ends(3, "cancelled")
    play.is_over("abandoned", "cancelled", "failed", "cancelled")


def test_a_client_that_leaves_while_cancelled_calls_are_awaited_is_heard() -> None:
    play = Play(0.5, 0.5)
    play.says(1, said(UNSURE))
    play.says(2, said(SURE, tokens=1))
    play.ends(2, "failed")
    play.ends(3, "failed")
    play.leaves()
    play.asks()
    play.ends(1)
    play.is_over("abandoned", "completed", "failed", "failed")


# -- any order of events ----------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> RoutePlan:
    seats = draw(st.lists(st.integers(1, 2), min_size=1, max_size=4))
    backends = [[f"{NAMES[rung]}{seat}" for seat in range(number)] for rung, number in enumerate(seats)]
    route = Route(
        name="auto",
        rungs=tuple(
            Rung(NAMES[rung], tuple(Seat(name, "m") for name in names), draw(st.sampled_from([None, 0.5])))
            for rung, names in enumerate(backends)
        ),
        hold=Hold(tokens=draw(st.integers(1, 3)), time_s=2.0, size_bytes=draw(st.sampled_from([50, 10_000]))),
        keep_doubted=draw(st.booleans()),
        doubt_unknown=draw(st.booleans()),
    )
    down = draw(st.sets(st.sampled_from([name for names in backends for name in names])))
    return make_plan(route, choices=draw(st.integers(1, 2)), down=down, tie_break=draw(st.integers(0, 5)))


class Run(msgspec.Struct):
    """What the driver of the property knows of one attempt."""

    attempt: PlannedAttempt
    signals: Signals = msgspec.field(default_factory=dict)
    steps: int = 0
    kept: bool = False
    cancelled: bool = False
    committed: bool = False
    outcome: Outcome | None = None


class Driver:
    """Performs a climb as a well-behaved driver does, whatever happens, and holds it to its promises."""

    def __init__(self, plan: RoutePlan, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._plan = plan
        self._draw = draw
        self._runs: list[Run] = []
        self._climb = climb(plan)
        self._now_s = 0.0
        self._alarm_s: float | None = None
        self._left = False
        self._events = 0

    def drive(self) -> None:
        try:
            self._perform(next(self._climb))
            while True:
                self._events += 1
                assert self._events < 300, "it does not end"
                self._perform(self._climb.send(self._event()))
        except StopIteration as stop:
            ending: Ending = stop.value
        for command in ending.last:
            assert isinstance(command, Commit)
            assert self._runs[command.id - 1].outcome == "completed"
        self._perform(ending.last)
        self._check(ending)

    def _perform(self, commands: tuple[Command, ...]) -> None:
        for command in commands:
            match command:
                case Start(id_, attempt):
                    self._runs.append(Run(attempt))
                    assert id_ == len(self._runs)
                    planned = (*self._plan.attempts, *self._plan.last_resort)
                    assert attempt in planned or attempt in [
                        msgspec.structs.replace(one, doubt_below=None) for one in planned
                    ]
                case WakeAt(at_s):
                    assert at_s >= self._now_s
                    self._alarm_s = at_s
                case Commit(id_, _, degraded):
                    run = self._runs[id_ - 1]
                    assert not any(one.committed for one in self._runs), "two commits"
                    assert run.outcome in (None, "completed")
                    assert run.signals or run.outcome == "completed", "nothing has come of it"
                    assert degraded or not run.kept
                    assert not run.cancelled or run.outcome == "completed"
                    run.committed, run.kept = True, False
                case Cancel(id_):
                    run = self._runs[id_ - 1]
                    assert run.outcome is None, "it is over"
                    assert not run.cancelled, "it was cancelled before"
                    run.cancelled = True
                case Keep(id_):
                    run = self._runs[id_ - 1]
                    assert run.outcome is None
                    assert not run.committed
                    run.kept = True

    def _event(self) -> Event:
        """Draw what happens next. Something must be on its way, or the climb waits for ever."""
        moving = [run for run in self._runs if run.outcome is None and (run.cancelled or not run.kept)]
        assert moving, "it waits for what cannot come"
        opened = [run for run in self._runs if run.outcome is None]
        kinds = ["run"] * 6 + ["due"] * (self._alarm_s is not None) + ["left"] * (not self._left)
        kind = self._draw(st.sampled_from(kinds))
        if kind == "left":
            self._left = True
            return Left(self._now_s)
        if kind == "due" and self._alarm_s is not None:
            self._now_s, self._alarm_s = max(self._now_s, self._alarm_s), None
            return Due(self._now_s)
        self._now_s += self._draw(st.sampled_from([0.0, 0.1, 5.0]))
        return self._of_run(self._draw(st.sampled_from(opened)))

    def _of_run(self, run: Run) -> Event:
        id_ = self._runs.index(run) + 1
        if run.cancelled:
            run.outcome = self._draw(st.sampled_from(["cancelled", "cancelled", "completed"]))
        elif run.kept:
            run.outcome = self._draw(st.sampled_from(["failed", "completed"]))
        elif run.steps >= 4 or self._draw(st.integers(0, 2)) == 0:
            run.outcome = self._draw(st.sampled_from(["completed", "failed"] + ["rejected"] * (not run.committed)))
        else:
            run.steps += 1
            self._grow(run)
            return Progress(id_, run.signals, run.steps * 20, self._now_s)
        if run.outcome == "completed":
            self._grow(run)
            for choice in run.signals.values():
                choice.finished = True
        return Finished(id_, run.outcome, run.signals, self._now_s)

    def _grow(self, run: Run) -> None:
        for index in range(self._draw(st.integers(1, self._plan.choices))):
            choice = run.signals.setdefault(index, ChoiceSignals())
            match self._draw(st.sampled_from(["sure", "unsure", "unscored", "reasoning", "nothing"])):
                case "sure":
                    choice.pieces += 1
                    choice.add([log(SURE)])
                case "unsure":
                    choice.pieces += 1
                    choice.add([log(UNSURE)])
                case "unscored":
                    choice.pieces += 1
                case "reasoning":
                    choice.reasoning_pieces += 1
                case _:
                    pass

    def _check(self, ending: Ending) -> None:
        runs = self._runs
        assert [one.id for one in ending.judged] == list(range(1, len(runs) + 1))
        assert [one.outcome for one in ending.judged] == [run.outcome for run in runs]
        assert None not in [run.outcome for run in runs]
        committed = [number for number, run in enumerate(runs, 1) if run.committed]
        assert committed == ([] if ending.committed is None else [ending.committed])
        match ending.kind:
            case "answered":
                assert ending.committed is not None
                assert runs[ending.committed - 1].outcome == "completed"
            case "broken":
                assert ending.committed is not None
                assert runs[ending.committed - 1].outcome != "completed"
            case "abandoned":
                assert self._left
            case "exhausted":
                assert ending.committed is None
                assert "completed" not in [run.outcome for run in runs]
                self._check_that_all_was_tried()
        if ending.committed is not None and not ending.degraded:
            served = ending.judged[ending.committed - 1]
            threshold = served.attempt.doubt_below
            assert not served.doubted
            if threshold is not None:
                assert served.confidence is None or served.confidence >= threshold
                assert served.confidence is not None or not self._plan.route.doubt_unknown

    def _check_that_all_was_tried(self) -> None:
        tried = {run.attempt.backend for run in self._runs}
        refused = {run.attempt.rung for run in self._runs if run.outcome == "rejected"}
        for attempt in (*self._plan.attempts, *self._plan.last_resort):
            assert attempt.backend in tried or attempt.rung in refused, "somebody was not asked"


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_happens_a_climb_keeps_its_promises(data: st.DataObject) -> None:
    Driver(data.draw(plans()), data.draw).drive()
