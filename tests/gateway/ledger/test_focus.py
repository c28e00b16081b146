"""Does the export keep the rules of FOCUS, and add up to the ledger to the nano-dollar?"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from pyarrow import parquet

from gateway.ledger import focus
from gateway.ledger.contract import Store
from gateway.ledger.report_query import HOUR_MS, Bucket, Query
from gateway.ledger.reports import read_report
from tests.gateway.ledger.many_rows import BEGIN_MS
from tests.gateway.ledger.test_reports import ROWS, made_store

QUERY = Query(since_ms=BEGIN_MS, until_ms=BEGIN_MS + 30 * 24 * HOUR_MS, timezone="Europe/Berlin")
Charge = dict[str, str | None]

NOT_NULL = [
    "BilledCost",
    "BillingAccountId",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeDescription",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ProviderName",
    "PublisherName",
    "ServiceCategory",
    "ServiceName",
    "ServiceProviderName",
    "HostProviderName",
    "ServiceSubcategory",
]
# What is there for lines of usage that are no corrections (all of ours), by the column pages of the specification.
OF_USAGE = [
    "ConsumedQuantity",
    "ConsumedUnit",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "SkuId",
    "SkuPriceId",
]
MAY_BE_NULL = [
    "BillingAccountName",
    "BillingAccountType",
    "ChargeClass",
    "ChargeFrequency",
    "ContractedUnitPrice",
    "InvoiceId",
    "ListUnitPrice",
    "PricingCurrency",
    "RegionId",
    "RegionName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "SkuMeter",
    "SkuPriceDetails",
    "SubAccountId",
    "SubAccountName",
    "SubAccountType",
    "Tags",
]
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
UNIT = re.compile(r"(1000000 )?[A-Z][a-z]+s")


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with made_store(request, tmp_path_factory.mktemp("focus")) as made:
        made.write(ROWS)
        yield made


def exported(store: Store, bucket: Bucket | None) -> list[Charge]:
    """As it is read from the file."""
    with store.reading() as reading:
        data = focus.as_csv(focus.charges(reading, msgspec.structs.replace(QUERY, bucket=bucket)))
    rows = csv.DictReader(io.StringIO(data.decode()))
    return [{name: value or None for name, value in row.items()} for row in rows]


def violations(charge: Charge) -> Iterator[str]:
    """What a line does wrong, by the rules of versions 1.2 and 1.3."""
    ours = {name for name in charge if name.startswith("x_")}
    if charge.keys() - ours != {*NOT_NULL, *OF_USAGE, *MAY_BE_NULL}:
        yield "columns"
    yield from (name for name in (*NOT_NULL, *OF_USAGE) if charge[name] is None)
    kinds = {name: kind for name, kind in focus.COLUMNS.items() if charge[name] is not None}
    for name, kind in kinds.items():
        form = {"time": TIME, "money": NUMBER, "quantity": NUMBER}.get(kind)
        if form is not None and not form.fullmatch(charge[name] or ""):
            yield f"form of {name}"
    if (charge["BillingCurrency"], charge["PricingCurrency"]) != ("USD", "USD"):
        yield "currency"
    if (charge["ChargeCategory"], charge["ChargeClass"], charge["ChargeFrequency"]) != ("Usage", None, "Usage-Based"):
        yield "charge"
    if charge["PricingCategory"] not in ("Standard", "Dynamic"):
        yield "PricingCategory"
    if (charge["ServiceCategory"], charge["ServiceSubcategory"]) != ("AI and Machine Learning", "Generative AI"):
        yield "ServiceCategory"
    yield from _periods(charge)
    yield from _prices(charge)
    for one, other in (("SubAccountId", "SubAccountName"), ("SubAccountId", "SubAccountType"), ("SkuId", "SkuMeter")):
        if (charge[one] is None) != (charge[other] is None):
            yield f"{one} without {other}"
    for name in ("Tags", "SkuPriceDetails"):
        found = json.loads(charge[name] or "{}")
        if not isinstance(found, dict) or any(isinstance(value, dict | list) for value in found.values()):
            yield name


def _periods(charge: Charge) -> Iterator[str]:
    begin, end, month, next_month = (
        datetime.fromisoformat(charge[name] or "")
        for name in ("ChargePeriodStart", "ChargePeriodEnd", "BillingPeriodStart", "BillingPeriodEnd")
    )
    if not month <= begin < end <= next_month:
        yield "periods"
    if (month.day, next_month.day) != (1, 1) or not timedelta(28) <= next_month - month <= timedelta(31):
        yield "billing period"


def _prices(charge: Charge) -> Iterator[str]:
    if charge["ListUnitPrice"] is None or charge["ContractedUnitPrice"] is None:
        yield "prices"
        return
    quantity = Decimal(charge["PricingQuantity"] or "")
    if Decimal(charge["ListCost"] or "") != Decimal(charge["ListUnitPrice"]) * quantity:
        yield "ListCost is not price times quantity"
    if Decimal(charge["ContractedCost"] or "") != Decimal(charge["ContractedUnitPrice"]) * quantity:
        yield "ContractedCost is not price times quantity"
    if not UNIT.fullmatch(charge["PricingUnit"] or ""):
        yield "PricingUnit"
    if charge["ConsumedUnit"] == "Tokens" and Decimal(charge["ConsumedQuantity"] or "") != quantity * 1_000_000:
        yield "tokens"


@pytest.mark.parametrize("bucket", ["day", "hour"])
def test_every_line_keeps_the_rules(store: Store, bucket: Bucket) -> None:
    charges = exported(store, bucket)
    assert len(charges) > 200
    assert {found for charge in charges for found in violations(charge)} == set()
    assert {charge["SkuMeter"] for charge in charges} == {
        "Input Tokens", "Cached Input Tokens", "Output Tokens", "GPU Time", "GPU Idle Time", "GPU Time Outside",
    }  # fmt: skip


def test_a_price_belongs_to_one_article(store: Store) -> None:
    skus: dict[str | None, set[str | None]] = {}
    for charge in exported(store, None):
        skus.setdefault(charge["SkuPriceId"], set()).add(charge["SkuId"])
    assert all(len(some) == 1 for some in skus.values())


@pytest.mark.parametrize("bucket", ["day", "hour"])
def test_bills_add_up_to_the_ledger(store: Store, bucket: Bucket) -> None:
    charges = exported(store, bucket)
    report = read_report(store, msgspec.structs.replace(QUERY, by=("team",)))
    for column in ("BilledCost", "EffectiveCost"):
        sums: dict[str | None, Decimal] = {}
        for charge in charges:
            team = charge["SubAccountId"] if charge["x_Key"] is not None else "servers"
            sums[team] = sums.get(team, Decimal(0)) + Decimal(charge[column] or "")
        assert sums.pop("servers") * 10**9 == report.idle_left_nusd + report.outside_nusd
        assert {team: int(usd * 10**9) for team, usd in sums.items()} == {
            line.names[0]: line.cost_nusd for line in report.lines
        }


def test_list_costs_differ_by_rounding_alone(store: Store) -> None:
    for charge in exported(store, None):
        if charge["ConsumedUnit"] == "Tokens":
            assert abs(Decimal(charge["ListCost"] or "") - Decimal(charge["BilledCost"] or "")) < Decimal("0.0000003")


def test_parquet_has_the_same_lines(store: Store, tmp_path: Path) -> None:
    with store.reading() as reading:
        charges = focus.charges(reading, QUERY)
    with (tmp_path / "focus.parquet").open("wb") as out:
        focus.as_parquet(charges, out)
    table = parquet.read_table(tmp_path / "focus.parquet")
    assert table.column_names == list(focus.COLUMNS)
    assert table.num_rows == len(charges)
    assert sum(table.column("BilledCost").to_pylist()) == sum(Decimal(str(one["BilledCost"])) for one in charges)
    assert str(table.schema.field("ChargePeriodStart").type) == "timestamp[ms, tz=UTC]"


def test_an_empty_ledger_exports_its_columns(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    request.param = "sqlite"
    with made_store(request, tmp_path) as store:
        assert exported(store, None) == []
        with store.reading() as reading:
            assert focus.as_csv(focus.charges(reading, QUERY)).decode().split("\r\n")[0] == ",".join(focus.COLUMNS)
