"""Where may this request go, and in which order? Route and fleet in, a list of attempts out."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import msgspec

from routing.ladder import Route, Seat


class PlannedAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """One call that may be made. `rung` is its place on the route; `doubt_below` as in `Rung`."""

    rung: int
    tier: str
    backend: str
    model: str
    doubt_below: float | None = None


class RoutePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What may be tried. `attempts` in order, cheapest tier first; `last_resort` only when nothing else can answer.

    `choices` is the number of answers in one response (`n`, times the number of prompts).
    """

    route: Route
    attempts: tuple[PlannedAttempt, ...]
    last_resort: tuple[PlannedAttempt, ...] = ()
    choices: int = 1


def make_plan(route: Route, *, choices: int, down: AbstractSet[str], tie_break: int) -> RoutePlan:
    """Plan a request on `route`.

    Backends believed `down` are passed over: they are a last resort. `tie_break` (any integer that differs between
    exchanges) spreads requests over the backends of a tier.
    """
    alive: list[PlannedAttempt] = []
    dead: list[PlannedAttempt] = []
    for number, rung in enumerate(route.rungs):
        for seat in _rotated(rung.seats, tie_break):
            attempt = PlannedAttempt(
                rung=number, tier=rung.tier, backend=seat.backend, model=seat.model, doubt_below=rung.doubt_below
            )
            (dead if seat.backend in down else alive).append(attempt)
    return RoutePlan(route=route, attempts=tuple(alive), last_resort=tuple(dead), choices=choices)


def _rotated(seats: tuple[Seat, ...], by: int) -> tuple[Seat, ...]:
    if len(seats) == 1:
        return seats
    first = by % len(seats)
    return seats[first:] + seats[:first]
