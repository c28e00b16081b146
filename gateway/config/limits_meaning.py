"""Do the limits make sense, one by one and together? A configuration in, findings out.

As in `gateway.config.meaning` a stand-in is never complained about, and a name is only called unknown where all names
it could be have been read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

import msgspec

from gateway.config.findings import Findings, spot
from gateway.config.model import Config, Limit, LocalBackend, RedisState, ScriptedBackend, Tier
from gateway.config.problem import guess, quoted
from gateway.config.shape import Mark, Place
from policies.limits import EACH

_MEASURES = ("requests", "tokens", "input_tokens", "output_tokens", "concurrent", "spend")
_OF_UNKNOWN_LENGTH = ("tokens", "output_tokens", "spend")
_INSIDE: Mapping[str, tuple[str, ...]] = {"deployment": (), "team": ("team", "key"), "key": ("key",)}
"""What lies within one partition: a limit whose scope has one of these never crosses it."""


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """What a client's `model` can mean.

    `reach` has the tiers that each name leads to, `aliases` the route of each alias; `whole` is whether all were read.
    """

    reach: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, str]
    whole: bool


class LimitsCheck:
    """The checks over the limits of one file: what they find goes to `findings`."""

    def __init__(self, config: Config, findings: Findings, names: Names) -> None:
        self._config = config
        self._found = findings
        self._names = names
        self._teams = {*config.teams, *(key.team for key in config.keys if key.team)} - {""}
        self._tiers = {tier.name: i for i, tier in enumerate(config.tiers)}
        first: dict[str, Mark] = {}
        for i, limit in enumerate(config.limits):
            place: Place = ("limits", i, "name")
            if limit.name in first:
                message = f"a second limit {quoted(limit.name)}; the first is at {spot(first[limit.name])}"
                findings.error(place, message)
            elif limit.name:
                first[limit.name] = findings.marks[place]
            if findings.sound(place[:2]) and all(getattr(limit, measure) is None for measure in _MEASURES):
                measures = ", ".join(quoted(measure) for measure in _MEASURES)
                findings.error(place[:2], f"limits nothing; it needs at least one of {measures}")
            self._scope(i, limit)
            self._window(i, limit)
            self._strict(i, limit)
        self._partitions()

    def _scope(self, i: int, limit: Limit) -> None:
        found, config = self._found, self._config
        known: Mapping[str, tuple[str, Iterable[str], bool]] = {
            "key": ("key", [key.name for key in config.keys], found.all_named("keys", "name")),
            "team": ("team", self._teams, found.all_named("keys", "team") and found.all_read("teams")),
            "route": ("route, tier or model", self._names.reach, self._names.whole),
            "model": ("route, alias, tier or model", self._names.reach, self._names.whole),
            "tier": ("tier", self._tiers, found.all_named("tiers", "name")),
        }
        for dimension, (what, names, whole) in known.items():
            place = ("limits", i, "scope", dimension)
            name: str | None = getattr(limit.scope, dimension)
            if name is None or name == EACH:
                continue
            if dimension == "route" and name in self._names.aliases:
                route = quoted(self._names.aliases[name])
                found.error(place, f"{quoted(name)} is an alias of route {route}; name that, or use `model`")
            elif name in names or not whole:
                continue
            elif dimension == "key" and config.server.admin is not None:
                hint = guess(name, names)
                found.warn(place, f"no key {quoted(name)} in this file; only one of the admin API can have it{hint}")
            else:
                hint = guess(name, [*names, EACH])
                if dimension == "team" and not hint:
                    hint = "; a team without keys in this file has to stand in `teams`"
                found.error(place, f"no {what} {quoted(name)}{hint}")

    def _window(self, i: int, limit: Limit) -> None:
        spend, place = limit.spend, ("limits", i, "spend")
        if spend is None:
            return
        if spend.per is None and self._found.sound(place):
            for key in ("window", "timezone"):
                if (*place, key) in self._found.marks:
                    message = "needs `per`: without it the sum is for ever, and has no window"
                    self._found.error((*place, key), message)
        if not spend.timezone or spend.timezone == "UTC":
            return
        if spend.window == "rolling":
            message = "a rolling window looks back from now, whatever the calendar says; leave it out"
            self._found.error((*place, "timezone"), message)
        fault = _fault_of_zone(spend.timezone)
        if fault:
            self._found.error((*place, "timezone"), fault)

    def _strict(self, i: int, limit: Limit) -> None:
        if limit.reserve != "strict" or all(getattr(limit, measure) is None for measure in _OF_UNKNOWN_LENGTH):
            return
        within = self._within_reach(limit)
        endless = [
            tier.name
            for j, tier in enumerate(self._config.tiers)
            if tier.name in within and self._found.sound(("tiers", j)) and not self._bounded(tier)
        ]
        if endless:
            who = f"tier {quoted(endless[0])}" if len(endless) == 1 else f"tiers {', '.join(map(quoted, endless))}"
            message = f"`strict` reserves the longest answer, and that of {who} is not known; give it"
            self._found.error(("limits", i, "reserve"), f"{message} `max_output_tokens` or `context_tokens`")

    def _within_reach(self, limit: Limit) -> set[str]:
        """Return the tiers that a request under this limit may come to."""
        within = set(self._tiers)
        scope, reach = limit.scope, self._names.reach
        if scope.tier is not None and scope.tier != EACH:
            within &= {scope.tier}
        for name in (scope.route, scope.model):
            if name is not None and name in reach:
                within &= set(reach[name])
        for key in self._config.keys:
            if key.name == scope.key and key.models is not None:
                within &= {tier for model in key.models for tier in reach.get(model, self._tiers)}
        return within

    def _bounded(self, tier: Tier) -> bool:
        """Whether the longest answer of a tier is known. The window of a local model is; a script has an end."""
        if tier.max_output_tokens is not None or tier.context_tokens is not None:
            return True
        backends = [self._config.backends.get(name) for name in tier.backends]
        return all(backend is None or isinstance(backend, LocalBackend | ScriptedBackend) for backend in backends)

    def _partitions(self) -> None:
        """Say which limits would have to count in two partitions at once."""
        state = self._config.state
        inside = _INSIDE[state.partition] if isinstance(state, RedisState) else ()
        if not inside or not isinstance(state, RedisState):
            return
        apart: dict[str, str] = {tier.name: "its `queue`" for tier in self._config.tiers if tier.queue is not None}
        within: list[tuple[int, str]] = []
        words = " or ".join(map(quoted, inside))
        for i, limit in enumerate(self._config.limits):
            if not self._found.sound(("limits", i, "scope")):
                continue
            one = any(getattr(limit.scope, dimension) is not None for dimension in inside)
            tiers = () if limit.scope.tier is None else self._tiers if limit.scope.tier == EACH else (limit.scope.tier,)
            if limit.scope.tier is None and not one:
                message = f"crosses partitions: with `partition: {state.partition}` its scope needs {words}"
                self._found.error(("limits", i, "scope"), message)
            elif one:
                within += [(i, tier) for tier in tiers]
            else:
                for tier in tiers:
                    apart.setdefault(tier, f"limit {quoted(limit.name)}")
        told: set[int] = set()
        for i, tier in within:
            if tier in apart and i not in told:
                told.add(i)
                message = f"counts tier {quoted(tier)} by {words}, and {apart[tier]} counts it as a whole"
                self._found.error(("limits", i, "scope", "tier"), f"{message}: those are two partitions")


def _fault_of_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # the last two: paths that are no name of a zone
        known = available_timezones()
        if not known:
            return "this machine knows no time zones but `UTC`; install its package `tzdata`"
        return f"no time zone {quoted(name)}{guess(name, known)}"
    return ""
