"""How much of what? Counters and histograms in Prometheus' text format.

Label values come from the configuration and from closed lists only, so the number of series is known beforehand.
A counter is a dict entry and a histogram a list: 0.1 us an observation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import msgspec

from gateway.decision import Decision

_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_NUSD_PER_USD = 1e9

Labels = tuple[str, ...]


class _Family(msgspec.Struct, frozen=True):
    name: str
    help: str
    labels: Labels


_EXCHANGES = _Family("tierway_exchanges_total", "Exchanges by ending.", ("route", "ending"))
_REFUSALS = _Family("tierway_refusals_total", "Requests answered with an error, by code.", ("code",))
_ATTEMPTS = _Family("tierway_attempts_total", "Calls to backends by outcome.", ("tier", "backend", "outcome"))
_TOKENS = _Family("tierway_tokens_total", "Tokens of all attempts.", ("tier", "kind"))
_COST = _Family("tierway_cost_usd_total", "Cost of all attempts.", ("tier",))
_LIMITED = _Family(
    "tierway_limited_total", "Times a limit had no room; shadow ones refuse nobody.", ("limit", "measure", "shadow")
)
_LOCAL = _Family("tierway_limits_local_total", "Limits applied while the store could not be asked.", ("mode",))
_DEGRADED = _Family("tierway_degraded_total", "Doubted answers served for want of a better one.", ("route",))
_STORE_FAULTS = _Family("tierway_limits_store_faults_total", "Times the store of the limits did not answer.", ())
_QUEUED = _Family("tierway_queue_seconds", "Time waited for a turn, of those that waited.", ("route",))
_FIRST_BYTE = _Family("tierway_first_byte_seconds", "Time to the first byte of an answer.", ("route",))
_DURATION = _Family("tierway_duration_seconds", "Time to the last byte of an answer.", ("route",))

# What others count and `Metrics.include` brings in.
_COUNTERS = (
    _Family("tierway_ledger_rows_total", "Rows written to the ledger.", ()),
    _Family("tierway_ledger_commits_total", "Commits they took.", ()),
    _Family("tierway_ledger_commit_seconds_total", "Time they took.", ()),
    _Family("tierway_ledger_failures_total", "Times the ledger could not be written.", ()),
    _Family("tierway_ledger_dropped_total", "Rows lost for want of room while it could not be written.", ()),
    _Family("tierway_ledger_lost_total", "Exchanges of dead processes that were billed as lost.", ()),
    _Family("tierway_alerts_total", "Alerts by type.", ("type",)),
    _Family("tierway_alert_attempts_total", "Attempts to deliver an alert, by outcome.", ("outcome",)),
)
_GAUGES = (
    _Family("tierway_waiting", "Requests that wait for a turn.", ()),
    _Family("tierway_limits_apart", "Processes that count limits by themselves, their store being down.", ()),
    _Family("tierway_open_exchanges", "Exchanges under way.", ()),
    _Family("tierway_ledger_waiting", "Rows that are not durable yet.", ()),
    _Family("tierway_ledger_unwritable", "Processes whose ledger cannot be written.", ()),
    _Family("tierway_ledger_spooled_rows", "Rows that wait in a file for the database.", ()),
    _Family("tierway_ledger_set_aside_rows", "Rows that the database will never take; they stay in the file.", ()),
    _Family("tierway_ledger_primary_down", "Processes whose ledger's database does not take rows.", ()),
    _Family("tierway_alerts_undelivered", "Alerts that nobody has taken yet.", ()),
    _Family("tierway_budget_used_ratio", "What is used of the fullest account of a budget.", ("limit",)),
    _Family("tierway_spend_anomaly", "How unlike its past the spending of an hour is, in spreads.", ("of", "name")),
)
_PLAIN = frozenset(("tierway_waiting", "tierway_limits_apart", "tierway_open_exchanges"))
"""Told as 0 where nobody counts them."""
_HIGHEST = frozenset(("tierway_budget_used_ratio", "tierway_spend_anomaly"))
"""Of several processes the highest counts, not the sum."""

Source = Callable[[], Mapping[str, Mapping[Labels, float]]]


class Snapshot(msgspec.Struct):
    """All numbers of one process; several add up."""

    counters: dict[str, dict[Labels, float]]
    histograms: dict[str, dict[Labels, list[float]]]

    def add(self, other: Snapshot) -> None:
        """Add the numbers of another process."""
        for name, series in other.counters.items():
            mine = self.counters.setdefault(name, {})
            for labels, value in series.items():
                known = mine.get(labels, 0.0)
                mine[labels] = max(known, value) if name in _HIGHEST else known + value
        for name, buckets in other.histograms.items():
            lists = self.histograms.setdefault(name, {})
            for labels, values in buckets.items():
                old = lists.get(labels)
                lists[labels] = values if old is None else [a + b for a, b in zip(old, values, strict=True)]


class Metrics:
    """The numbers of this process."""

    def __init__(self) -> None:
        self._counters: dict[str, defaultdict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, dict[Labels, list[float]]] = defaultdict(dict)
        self._sources: list[Source] = []
        self.open_exchanges = 0

    def include(self, source: Source) -> None:
        """Have counters that are kept elsewhere in every snapshot."""
        self._sources.append(source)

    def refused(self, code: str) -> None:
        """Count an error answer."""
        self._counters[_REFUSALS.name][(code,)] += 1

    def limited(self, limit: str, measure: str, *, shadow: bool) -> None:
        """Count a limit that had no room."""
        self._counters[_LIMITED.name][(limit, measure, "true" if shadow else "false")] += 1

    def decided(self, decision: Decision) -> None:
        """Count an exchange."""
        counters = self._counters
        counters[_EXCHANGES.name][(decision.route, decision.ending)] += 1
        if decision.degraded:
            counters[_DEGRADED.name][(decision.route,)] += 1
        for attempt in decision.attempts:
            counters[_ATTEMPTS.name][(attempt.tier, attempt.backend, attempt.outcome)] += 1
            tokens, usage = counters[_TOKENS.name], attempt.usage
            tokens[(attempt.tier, "prompt")] += usage.prompt_tokens
            tokens[(attempt.tier, "cached_prompt")] += usage.cached_prompt_tokens
            tokens[(attempt.tier, "completion")] += usage.completion_tokens
            counters[_COST.name][(attempt.tier,)] += attempt.cost.total_nusd / _NUSD_PER_USD
        if decision.first_byte_s is not None:
            self._observe(_FIRST_BYTE, (decision.route,), decision.first_byte_s)
        self._observe(_DURATION, (decision.route,), decision.total_s)
        if decision.queued_s:
            self._observe(_QUEUED, (decision.route,), decision.queued_s)

    def _observe(self, family: _Family, labels: Labels, seconds: float) -> None:
        lists = self._histograms[family.name]
        values = lists.get(labels)
        if values is None:
            values = lists[labels] = [0.0] * (len(_BOUNDS_S) + 2)
        values[bisect_left(_BOUNDS_S, seconds)] += 1
        values[-1] += seconds

    def snapshot(self) -> Snapshot:
        """Return the numbers as they are now."""
        return Snapshot(
            counters={
                **{name: dict(series) for name, series in self._counters.items()},
                **{name: dict(series) for source in self._sources for name, series in source().items()},
                "tierway_open_exchanges": {(): float(self.open_exchanges)},
            },
            histograms={
                name: {labels: [*values] for labels, values in lists.items()}
                for name, lists in self._histograms.items()
            },
        )


def render(snapshot: Snapshot, *, up: Mapping[str, bool | None], version: str, config: str) -> bytes:
    """Write Prometheus' text format, version 0.0.4."""
    lines: list[str] = []
    for family in (_EXCHANGES, _REFUSALS, _ATTEMPTS, _TOKENS, _COST, _DEGRADED, _LIMITED, _LOCAL, _STORE_FAULTS):
        series = snapshot.counters.get(family.name, {})
        lines += _head(family, "counter")
        lines += [f"{family.name}{_labels(family.labels, labels)} {value:.15g}" for labels, value in series.items()]
    for family in (_FIRST_BYTE, _DURATION, _QUEUED):
        lines += _head(family, "histogram")
        for labels, values in snapshot.histograms.get(family.name, {}).items():
            lines += _buckets(family, labels, values)
    for family in _COUNTERS:
        lines += _told(family, "counter", snapshot)
    for family in _GAUGES:
        lines += _told(family, "gauge", snapshot)
    lines += _head(_Family("tierway_backend_up", "1 where the last probe or call reached the backend.", ()), "gauge")
    lines += [f"tierway_backend_up{_labels(('backend',), (name,))} {int(bool(state))}" for name, state in up.items()]
    lines += _head(_Family("tierway_build_info", "Version and configuration.", ()), "gauge")
    lines.append(f"tierway_build_info{_labels(('version', 'config'), (version, config))} 1")
    return ("\n".join(lines) + "\n").encode()


def _told(family: _Family, kind: str, snapshot: Snapshot) -> list[str]:
    series = snapshot.counters.get(family.name) or ({(): 0.0} if family.name in _PLAIN else {})
    return [
        *_head(family, kind),
        *(f"{family.name}{_labels(family.labels, labels)} {value:.15g}" for labels, value in series.items()),
    ]


def _head(family: _Family, kind: str) -> list[str]:
    return [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {kind}"]


def _labels(names: Iterable[str], values: Iterable[str]) -> str:
    pairs = [f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)]
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _buckets(family: _Family, labels: Labels, values: list[float]) -> list[str]:
    lines: list[str] = []
    total = 0.0
    for bound, count in zip((*_BOUNDS_S, float("inf")), values[:-1], strict=True):
        total += count
        edge = "+Inf" if bound == float("inf") else f"{bound:g}"
        lines.append(f"{family.name}_bucket{_labels((*family.labels, 'le'), (*labels, edge))} {total:.15g}")
    shown = _labels(family.labels, labels)
    return [*lines, f"{family.name}_sum{shown} {values[-1]:.15g}", f"{family.name}_count{shown} {total:.15g}"]
