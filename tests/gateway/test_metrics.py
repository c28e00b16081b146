"""Can Prometheus read what we count, and does it add up?"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decision import AttemptRecord, Decision, Payer
from gateway.metrics import Metrics, Snapshot, render
from gateway.wire import TokenUsage
from policies.cost import Cost

SAMPLE = re.compile(r'([a-z_:]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\["\\n])*)"')
ESCAPED = re.compile(r'\\(["\\n])')

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(page: bytes) -> tuple[Samples, dict[str, str]]:
    """Read the text format 0.0.4 as its specification says; return samples and the types of families."""
    text = page.decode()
    assert text.endswith("\n")
    assert "\n\n" not in text
    samples: Samples = {}
    types: dict[str, str] = {}
    family = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
            assert family not in types
        elif line.startswith("# TYPE "):
            assert line.split(" ")[2] == family
            types[family] = line.split(" ")[3]
        else:
            found = SAMPLE.fullmatch(line)
            assert found, line
            name = found[1]
            suffixes = ("_bucket", "_sum", "_count") if types[family] == "histogram" else ("",)
            assert name in {family + suffix for suffix in suffixes}
            labels = frozenset(
                (key, ESCAPED.sub(lambda one: {"n": "\n"}.get(one[1], one[1]), value))
                for key, value in LABEL.findall(found[2] or "")
            )
            assert (name, labels) not in samples
            samples[name, labels] = float(found[3])
    return samples, types


def read(snapshot: Snapshot, **up: bool | None) -> Samples:
    return parsed(render(snapshot, up=up, version="0.1", config="abc"))[0]


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def attempt(**fields: Any) -> AttemptRecord:
    given_fields: dict[str, Any] = {
        "number": 1,
        "role": "answer",
        "tier": "small",
        "backend": "s1",
        "model": "m",
        "outcome": "accepted",
        "fault": None,
        "fault_detail": None,
        "confidence": 0.9,
        "doubt_below": 0.5,
        "usage": TokenUsage(prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=20),
        "cost": Cost(input_nusd=1_000, output_nusd=2_000),
        "started_s": 0.0,
        "first_token_s": 0.1,
        "ended_s": 0.2,
    }
    return AttemptRecord(**(given_fields | fields))


def decision(*attempts: AttemptRecord, **fields: Any) -> Decision:
    given_fields: dict[str, Any] = {
        "exchange_id": "x",
        "request_id": "r",
        "payer": Payer(key="k"),
        "endpoint": "chat/completions",
        "asked": "auto",
        "route": "auto",
        "streamed": True,
        "ending": "answered",
        "error": None,
        "degraded": False,
        "served": 1 if attempts else None,
        "confidence": 0.9,
        "confidence_kind": "raw",
        "attempts": attempts,
        "created_at": 0.0,
        "first_byte_s": 0.2,
        "total_s": 1.5,
        "config": "abc",
    }
    return Decision(**(given_fields | fields))


def test_an_empty_page_is_valid_and_names_every_family() -> None:
    samples, types = parsed(render(Metrics().snapshot(), up={}, version="0.1", config="abc"))
    assert types == {
        "tierway_exchanges_total": "counter",
        "tierway_refusals_total": "counter",
        "tierway_attempts_total": "counter",
        "tierway_tokens_total": "counter",
        "tierway_cost_usd_total": "counter",
        "tierway_degraded_total": "counter",
        "tierway_limited_total": "counter",
        "tierway_limits_local_total": "counter",
        "tierway_limits_store_faults_total": "counter",
        "tierway_queue_seconds": "histogram",
        "tierway_ledger_rows_total": "counter",
        "tierway_ledger_commits_total": "counter",
        "tierway_ledger_commit_seconds_total": "counter",
        "tierway_ledger_failures_total": "counter",
        "tierway_ledger_dropped_total": "counter",
        "tierway_ledger_lost_total": "counter",
        "tierway_alerts_total": "counter",
        "tierway_alert_attempts_total": "counter",
        "tierway_waiting": "gauge",
        "tierway_limits_apart": "gauge",
        "tierway_ledger_waiting": "gauge",
        "tierway_ledger_unwritable": "gauge",
        "tierway_ledger_spooled_rows": "gauge",
        "tierway_ledger_set_aside_rows": "gauge",
        "tierway_ledger_primary_down": "gauge",
        "tierway_alerts_undelivered": "gauge",
        "tierway_budget_used_ratio": "gauge",
        "tierway_spend_anomaly": "gauge",
        "tierway_first_byte_seconds": "histogram",
        "tierway_duration_seconds": "histogram",
        "tierway_open_exchanges": "gauge",
        "tierway_backend_up": "gauge",
        "tierway_build_info": "gauge",
    }
    assert at(samples, "tierway_open_exchanges") == 0
    assert at(samples, "tierway_build_info", version="0.1", config="abc") == 1


def test_numbers_kept_elsewhere_are_told_and_add_up() -> None:
    one, other = Metrics(), Metrics()
    for metrics in (one, other):
        metrics.include(lambda: {"tierway_limits_local_total": {("granted",): 2.0}, "tierway_waiting": {(): 3.0}})
        metrics.limited("per-key", "tokens", shadow=True)
    snapshot = one.snapshot()
    snapshot.add(other.snapshot())
    found = read(snapshot)
    assert at(found, "tierway_limits_local_total", mode="granted") == 4
    assert at(found, "tierway_waiting") == 6
    assert at(found, "tierway_limited_total", limit="per-key", measure="tokens", shadow="true") == 2


def test_of_several_processes_the_fullest_budget_is_told() -> None:
    one, other = Metrics(), Metrics()
    one.include(lambda: {"tierway_budget_used_ratio": {("team",): 0.25}, "tierway_ledger_rows_total": {(): 2.0}})
    other.include(lambda: {"tierway_budget_used_ratio": {("team",): 0.75}, "tierway_ledger_rows_total": {(): 3.0}})
    snapshot = one.snapshot()
    snapshot.add(other.snapshot())
    found = read(snapshot)
    assert at(found, "tierway_budget_used_ratio", limit="team") == 0.75
    assert at(found, "tierway_ledger_rows_total") == 5


def test_an_exchange_is_counted_with_all_its_attempts() -> None:
    metrics = Metrics()
    doubted = attempt(outcome="doubted", cost=Cost(output_nusd=500))
    metrics.decided(decision(doubted, attempt(tier="large", backend="l1"), degraded=True))
    metrics.decided(decision(attempt(), ending="broken"))
    metrics.open_exchanges = 3
    found = read(metrics.snapshot())
    assert at(found, "tierway_exchanges_total", route="auto", ending="answered") == 1
    assert at(found, "tierway_exchanges_total", route="auto", ending="broken") == 1
    assert at(found, "tierway_degraded_total", route="auto") == 1
    assert at(found, "tierway_attempts_total", tier="small", backend="s1", outcome="doubted") == 1
    assert at(found, "tierway_attempts_total", tier="small", backend="s1", outcome="accepted") == 1
    assert at(found, "tierway_attempts_total", tier="large", backend="l1", outcome="accepted") == 1
    assert at(found, "tierway_tokens_total", tier="small", kind="prompt") == 20
    assert at(found, "tierway_tokens_total", tier="small", kind="cached_prompt") == 8
    assert at(found, "tierway_tokens_total", tier="large", kind="completion") == 20
    assert at(found, "tierway_cost_usd_total", tier="small") == pytest.approx(3.5e-6)
    assert at(found, "tierway_cost_usd_total", tier="large") == pytest.approx(3e-6)
    assert at(found, "tierway_open_exchanges") == 3


def test_refusals_are_counted_by_code() -> None:
    metrics = Metrics()
    for code in ("invalid_json", "invalid_json", "unknown_url"):
        metrics.refused(code)
    found = read(metrics.snapshot())
    assert at(found, "tierway_refusals_total", code="invalid_json") == 2
    assert at(found, "tierway_refusals_total", code="unknown_url") == 1


def test_a_histogram_is_cumulative_and_its_edges_belong_to_their_bucket() -> None:
    metrics = Metrics()
    for total_s in (0.001, 0.01, 0.011, 2.5, 300.0, 301.0):
        metrics.decided(decision(total_s=total_s, first_byte_s=None))
    found = read(metrics.snapshot())
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name == "tierway_duration_seconds_bucket"
    }
    edges = list(buckets)
    assert edges[-1] == "+Inf"
    assert [float(edge) for edge in edges] == sorted(float(edge) for edge in edges)
    assert list(buckets.values()) == sorted(buckets.values())
    assert (buckets["0.01"], buckets["0.025"], buckets["2.5"], buckets["300"], buckets["+Inf"]) == (2, 3, 4, 5, 6)
    assert at(found, "tierway_duration_seconds_count", route="auto") == 6
    assert at(found, "tierway_duration_seconds_sum", route="auto") == pytest.approx(603.522)
    assert not any(name.startswith("tierway_first_byte_seconds") for name, _ in found)


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\nb", "é🙂", '\\"', "\\n", 'x="y",z="', "{}", ""])
def test_label_values_are_escaped_and_read_back_as_they_were(value: str) -> None:
    metrics = Metrics()
    metrics.decided(decision(attempt(tier=value, backend=value), route=value))
    samples, _ = parsed(render(metrics.snapshot(), up={value: True}, version=value, config=value))
    assert at(samples, "tierway_exchanges_total", route=value, ending="answered") == 1
    assert at(samples, "tierway_attempts_total", tier=value, backend=value, outcome="accepted") == 1
    assert at(samples, "tierway_duration_seconds_count", route=value) == 1
    assert at(samples, "tierway_backend_up", backend=value) == 1
    assert at(samples, "tierway_build_info", version=value, config=value) == 1


def test_a_backend_that_nobody_has_reached_is_not_up() -> None:
    found = read(Metrics().snapshot(), s1=True, s2=False, s3=None)
    assert [at(found, "tierway_backend_up", backend=name) for name in ("s1", "s2", "s3")] == [1, 0, 0]


def test_large_numbers_lose_no_digit() -> None:
    snapshot = Snapshot(
        counters={"tierway_tokens_total": {("small", "prompt"): 123_456_789_012_345.0}},
        histograms={"tierway_duration_seconds": {("auto",): [1_234_567.0, *[0.0] * 13, 12_345_678.25]}},
    )
    found = read(snapshot)
    assert at(found, "tierway_tokens_total", tier="small", kind="prompt") == 123_456_789_012_345
    assert at(found, "tierway_duration_seconds_bucket", route="auto", le="+Inf") == 1_234_567
    assert at(found, "tierway_duration_seconds_count", route="auto") == 1_234_567
    assert at(found, "tierway_duration_seconds_sum", route="auto") == 12_345_678.25


def test_a_snapshot_does_not_move() -> None:
    metrics = Metrics()
    metrics.decided(decision(attempt()))
    metrics.refused("invalid_json")
    taken = metrics.snapshot()
    before = read(taken)
    metrics.decided(decision(attempt()))
    metrics.refused("invalid_json")
    assert read(taken) == before
    assert read(metrics.snapshot()) != before


def test_the_numbers_of_several_processes_add_up() -> None:
    one, two = Metrics(), Metrics()
    one.decided(decision(attempt(), total_s=0.02))
    one.refused("invalid_json")
    one.open_exchanges = 1
    two.decided(decision(attempt(), total_s=0.02))
    two.decided(decision(attempt(tier="large"), route="other", total_s=400.0))
    two.open_exchanges = 2
    both = one.snapshot()
    both.add(two.snapshot())
    found = read(both)
    assert at(found, "tierway_exchanges_total", route="auto", ending="answered") == 2
    assert at(found, "tierway_exchanges_total", route="other", ending="answered") == 1
    assert at(found, "tierway_refusals_total", code="invalid_json") == 1
    assert at(found, "tierway_open_exchanges") == 3
    assert at(found, "tierway_duration_seconds_count", route="auto") == 2
    assert at(found, "tierway_duration_seconds_bucket", route="auto", le="0.025") == 2
    assert at(found, "tierway_duration_seconds_sum", route="other") == 400


def test_adding_changes_neither_the_other_snapshot_nor_the_living_numbers() -> None:
    metrics = Metrics()
    metrics.decided(decision(attempt()))
    first, second = metrics.snapshot(), metrics.snapshot()
    total = Metrics().snapshot()
    for one in (first, second, metrics.snapshot()):
        total.add(one)
    assert at(read(total), "tierway_duration_seconds_count", route="auto") == 3
    assert read(first) == read(second) == read(metrics.snapshot())


def test_a_snapshot_travels_between_processes() -> None:
    metrics = Metrics()
    metrics.decided(decision(attempt()))
    taken = metrics.snapshot()
    packed = msgspec.msgpack.encode(taken)
    assert msgspec.msgpack.decode(packed, type=Snapshot) == taken


@given(st.lists(st.tuples(st.floats(0, 1000), st.sampled_from(["a", "b"])), max_size=20), st.integers(0, 20))
def test_it_does_not_matter_which_process_served_whom(served: list[tuple[float, str]], cut: int) -> None:
    alone, one, two = Metrics(), Metrics(), Metrics()
    for number, (total_s, route) in enumerate(served):
        made = decision(attempt(), total_s=total_s, route=route)
        alone.decided(made)
        (one if number < cut else two).decided(made)
    both = one.snapshot()
    both.add(two.snapshot())
    expected, found = read(alone.snapshot()), read(both)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx([expected[key] for key in found])
