"""How do tierway and OpenCost exchange what GPUs cost? Prices of nodes in, closed hours as custom costs out.

Prices come from OpenCost's own metrics: `node_gpu_hourly_cost` is what one GPU of a node costs in an hour, in dollars,
`node_gpu_count` how many it has. Hours go out as the `CustomCostResponse` of OpenCost's plugins
(`protos/customcost/messages.proto`), in the JSON form of protobuf with the names of that file: a plugin of OpenCost is
a program in Go that reads this text and passes it on. Its costs are 32-bit floats, so each also carries the exact
number of nano-dollars in its metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Literal

import msgspec

from gateway.ledger.contract import Reading
from gateway.ledger.rows import ClosingRow
from policies.cost import usd
from policies.gpu import apportioned

_HOUR_S = 3600
_SAMPLE = re.compile(
    r'^(node_gpu_hourly_cost|node_gpu_count)\{((?:[^}"]|"(?:[^"\\]|\\.)*")*)\}[ \t]+(\S+)', re.MULTILINE
)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')

_CLOSINGS = f"""
SELECT {", ".join(f"c.{name}" for name in ClosingRow.__struct_fields__)} FROM closings c
WHERE c.hour >= ? AND c.hour < ? AND c.revision =
    (SELECT MAX(d.revision) FROM closings d WHERE d.backend = c.backend AND d.hour = c.hour)
ORDER BY c.hour, c.backend
"""  # noqa: S608 - names of ours
_TEAMS = """
SELECT j.backend, j.hour, COALESCE(j.team, ''), SUM(j.share_nusd) FROM adjustments j
WHERE j.backend = ? AND j.hour = ? AND j.revision =
    (SELECT MAX(k.revision) FROM adjustments k
     WHERE k.exchange_id = j.exchange_id AND k.number = j.number AND k.hour = j.hour)
GROUP BY j.backend, j.hour, COALESCE(j.team, '') ORDER BY 3
"""


class NodePrice(msgspec.Struct, frozen=True):
    """What the GPUs of a node cost by OpenCost: dollars of one for an hour, and how many there are."""

    node: str
    usd_per_hour: str
    count: int


class CustomCost(msgspec.Struct, frozen=True, kw_only=True):
    """One cost, as OpenCost's `CustomCost`. Money is in dollars."""

    id: str
    account_name: str
    charge_category: Literal["Usage"] = "Usage"
    description: str
    resource_name: str
    resource_type: Literal["GPU server"] = "GPU server"
    billed_cost: float
    list_cost: float
    usage_quantity: float
    usage_unit: Literal["hours"] = "hours"
    labels: dict[str, str]
    metadata: dict[str, str]


class CustomCosts(msgspec.Struct, frozen=True, kw_only=True):
    """An hour of all servers, as OpenCost's `CustomCostResponse`."""

    cost_source: Literal["AI"] = "AI"
    domain: Literal["tierway"] = "tierway"
    version: Literal["v1"] = "v1"
    currency: Literal["USD"] = "USD"
    start: datetime
    end: datetime
    costs: list[CustomCost]


def node_prices(metrics: str) -> list[NodePrice]:
    """Read the GPU prices in OpenCost's metrics, by node. One without GPUs, or without a price of them, is left out."""
    costs: dict[str, Decimal] = {}
    counts: dict[str, int] = {}
    for name, labels, number in _SAMPLE.findall(metrics):
        node = dict(_LABEL.findall(labels)).get("node")
        try:
            value = Decimal(number)
        except InvalidOperation:
            continue
        if node is None or not value.is_finite() or value <= 0:
            continue
        if name == "node_gpu_count":
            counts[node] = int(value)
        else:
            costs[node] = value
    return [NodePrice(node, f"{cost.normalize():f}", counts.get(node, 1)) for node, cost in sorted(costs.items())]


def custom_costs(
    reading: Reading, from_hour: int, until_hour: int, idle: Literal["nobody", "teams", "requests"]
) -> Iterator[CustomCosts]:
    """Return the closed hours from one until just before another, oldest first.

    Of each server there is a cost for every team that had a share, for traffic from outside, and for idle time, which
    with `teams` is divided among them by their shares. What a server's costs come to is the price of its hour.
    """
    hours: dict[int, list[ClosingRow]] = {}
    for row in reading.rows(_CLOSINGS, (from_hour, until_hour)):
        closing = msgspec.convert(dict(zip(ClosingRow.__struct_fields__, row, strict=True)), ClosingRow)
        hours.setdefault(closing.hour, []).append(closing)
    for hour, closings in hours.items():
        yield CustomCosts(
            start=datetime.fromtimestamp(hour * _HOUR_S, UTC),
            end=datetime.fromtimestamp((hour + 1) * _HOUR_S, UTC),
            costs=[cost for closing in closings for cost in _costs(reading, closing, idle)],
        )


def _costs(reading: Reading, closing: ClosingRow, idle: str) -> Iterator[CustomCost]:
    rows = reading.rows(_TEAMS, (closing.backend, closing.hour))
    shares = {str(team): nusd for _, _, team, nusd in rows if isinstance(nusd, int) and nusd}
    for team, nusd in shares.items():
        yield _cost(closing, "share", team, nusd)
    if closing.outside_nusd:
        yield _cost(closing, "outside", "", closing.outside_nusd)
    if not closing.idle_nusd:
        return
    if idle == "teams" and shares:
        for team, nusd in zip(shares, _by_share(closing.idle_nusd, shares.values()), strict=True):
            yield _cost(closing, "idle", team, nusd)
    else:
        yield _cost(closing, "idle", "", closing.idle_nusd)


def _by_share(amount: int, shares: Iterable[int]) -> list[int]:
    return apportioned(amount, list(shares))


def _cost(closing: ClosingRow, kind: Literal["share", "outside", "idle"], team: str, nusd: int) -> CustomCost:
    what = {"share": "requests", "outside": "traffic that did not come through tierway", "idle": "idle time"}[kind]
    dollars = float(usd(nusd))
    return CustomCost(
        id=f"tierway/{closing.backend}/{closing.hour}/{kind}/{team}",
        account_name=team,
        description=f"{what} on {closing.backend}",
        resource_name=closing.backend,
        billed_cost=dollars,
        list_cost=dollars,
        usage_quantity=nusd / closing.hour_nusd,
        labels={"tier": closing.tier, "kind": kind, **({"team": team} if team else {})},
        metadata={"billed_nusd": str(nusd), "revision": str(closing.revision)},
    )
