"""Is what OpenCost is told all that the hours cost, and what it says of nodes a price that can be written down?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.ledger.opencost import NodePrice, custom_costs, node_prices
from gateway.ledger.rows import AdjustmentRow, ClosingRow
from gateway.ledger.sqlite import SqliteStore

HOUR = 490_000
METRICS = r"""
# HELP node_gpu_hourly_cost node_gpu_hourly_cost Cost for each gpu on node
# TYPE node_gpu_hourly_cost gauge
node_gpu_hourly_cost{arch="amd64",instance="gpu-1",instance_type="a\"}b",node="gpu-1",provider_id="x"} 2.4900000000000002
node_gpu_hourly_cost{instance="cpu-1",node="cpu-1"} 0
node_gpu_hourly_cost{instance="gpu-2",node="gpu-2"} 9.5e-1
node_gpu_hourly_cost{instance="gpu-3",node="gpu-3"} NaN
node_gpu_count{instance="gpu-1",node="gpu-1"} 8
node_gpu_count{instance="cpu-1",node="cpu-1"} 0
node_total_hourly_cost{instance="gpu-1",node="gpu-1"} 21.5
"""


def test_prices_of_gpus_are_read_by_node() -> None:
    assert node_prices(METRICS) == [NodePrice("gpu-1", "2.4900000000000002", 8), NodePrice("gpu-2", "0.95", 1)]
    assert node_prices("") == []


def closing(revision: int, shares: int, idle: int, outside: int) -> ClosingRow:
    return ClosingRow(
        backend="gpu-a", hour=HOUR, revision=revision, tier="large", at_ms=0, hour_nusd=shares + idle + outside,
        shares_nusd=shares, idle_nusd=idle, outside_nusd=outside, busy_ms=0, attempts=2, price_version="x",
        instance="here",
    )  # fmt: skip


def adjustment(number: int, revision: int, share: int, team: str | None) -> AdjustmentRow:
    return AdjustmentRow(
        exchange_id="x", number=number, hour=HOUR, revision=revision, backend="gpu-a", share_nusd=share,
        change_nusd=0, at_ms=0, key_name="k", team=team, route="auto", tier="large", shown=1,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "ledger.db")
    store.write(
        [
            *(closing(1, 90, 800, 110), closing(2, 100, 801, 99)),
            *(adjustment(1, 1, 30, "red"), adjustment(2, 1, 60, None), adjustment(1, 2, 40, "red")),
        ]
    )
    try:
        yield store
    finally:
        store.close()


def costs(store: SqliteStore, idle: Any) -> list[tuple[str, str, int]]:
    with store.reading() as reading:
        (hour,) = custom_costs(reading, HOUR, HOUR + 1, idle)
    assert sum(int(cost.metadata["billed_nusd"]) for cost in hour.costs) == 1000
    return [(cost.labels["kind"], cost.account_name, int(cost.metadata["billed_nusd"])) for cost in hour.costs]


def test_the_costs_of_an_hour_are_its_price_by_the_last_revision(store: SqliteStore) -> None:
    assert costs(store, "nobody") == [("share", "", 60), ("share", "red", 40), ("outside", "", 99), ("idle", "", 801)]


def test_idle_time_is_divided_by_shares_where_teams_bear_it(store: SqliteStore) -> None:
    assert costs(store, "teams")[3:] == [("idle", "", 481), ("idle", "red", 320)]


def test_it_is_the_message_of_opencosts_plugins(store: SqliteStore) -> None:
    with store.reading() as reading:
        (hour,) = custom_costs(reading, HOUR, HOUR + 1, "nobody")
        assert list(custom_costs(reading, HOUR + 1, HOUR + 9, "nobody")) == []
    found = msgspec.json.decode(msgspec.json.encode(hour))
    assert found["start"] == "2025-11-24T16:00:00Z"
    assert (found["domain"], found["currency"], found["cost_source"]) == ("tierway", "USD", "AI")
    assert found["costs"][1]["billed_cost"] == 4e-8
    assert len({cost["id"] for cost in found["costs"]}) == 4
