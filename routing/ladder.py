"""What can be asked for, and which tiers may answer? The tiers, the routes over them, and every name of both."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from routing.confidence import Estimator, MeanLogprob


class Seat(msgspec.Struct, frozen=True):
    """One backend of a tier: its name in the configuration and the model id that it serves."""

    backend: str
    model: str


class Rung(msgspec.Struct, frozen=True):
    """A tier on a route. An answer less sure than `doubt_below` is doubted; None: it never is."""

    tier: str
    seats: tuple[Seat, ...]
    doubt_below: float | None = None


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a stream is held before it is judged, whichever is reached first: tokens a choice, time, bytes."""

    tokens: int = 16
    time_s: float = 2.0
    size_bytes: int = 256 * 1024


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """The rungs that a request may climb, cheapest first, and how its answers are judged.

    `doubt_unknown` says what to make of an answer without log-probabilities, `keep_doubted` whether a doubted answer
    is kept until the next tier has begun.
    """

    name: str
    rungs: tuple[Rung, ...]
    estimator: Estimator = MeanLogprob()
    hold: Hold = Hold()
    doubt_unknown: bool = True
    keep_doubted: bool = True

    @property
    def judged(self) -> bool:
        """Whether any answer on this route can be doubted, so that log-probabilities are wanted."""
        return any(rung.doubt_below is not None for rung in self.rungs)


class Ladder(msgspec.Struct, frozen=True):
    """Every name that a client may ask for: routes and their aliases, tiers, and the backends' own model ids.

    A tier or a model id is a route of one rung that is never doubted.
    """

    names: Mapping[str, Route]

    def find(self, name: str) -> Route | None:
        """Return the route that `name` stands for."""
        return self.names.get(name)
