"""How is spending told to tools of FinOps? As charges in the columns of FOCUS.

That is the FinOps Open Cost and Usage Specification, version 1.3 (https://focus.finops.org/focus-specification/v1-3/),
with the columns of 1.2 that it calls deprecated, so that readers of either find what they must. One line is all that
one key used of one meter (input, cached input or output tokens, GPU time) at one server and price within an hour or a
day of UTC.

`BilledCost` and `EffectiveCost` add up to the ledger, to the nano-dollar. `ListCost` and `ContractedCost` are price
times quantity, as FOCUS wants them; they differ from the bill by what was rounded request by request, below a
nano-dollar each. Servers that stood idle, and work that was not tierway's, are lines of their own without a team.
"""
# ruff: noqa: S608 - names and numbers of ours go into statements, what others chose are values

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import BinaryIO

import msgspec

from gateway.ledger import report_sql as sql
from gateway.ledger.contract import Reading, Value
from gateway.ledger.report_forms import Record, write_parquet
from gateway.ledger.report_forms import as_csv as written_csv
from gateway.ledger.report_query import DAY_MS, HOUR_MS, Bucket, Query, Span, spans_of
from policies.cost import usd

VERSION = "1.3"

COLUMNS: dict[str, str] = {
    "BilledCost": "money",
    "BillingAccountId": "text",
    "BillingAccountName": "text",
    "BillingAccountType": "text",
    "BillingCurrency": "text",
    "BillingPeriodEnd": "time",
    "BillingPeriodStart": "time",
    "ChargeCategory": "text",
    "ChargeClass": "text",
    "ChargeDescription": "text",
    "ChargeFrequency": "text",
    "ChargePeriodEnd": "time",
    "ChargePeriodStart": "time",
    "ConsumedQuantity": "quantity",
    "ConsumedUnit": "text",
    "ContractedCost": "quantity",
    "ContractedUnitPrice": "money",
    "EffectiveCost": "money",
    "HostProviderName": "text",
    "InvoiceId": "text",
    "InvoiceIssuerName": "text",
    "ListCost": "quantity",
    "ListUnitPrice": "money",
    "PricingCategory": "text",
    "PricingCurrency": "text",
    "PricingQuantity": "quantity",
    "PricingUnit": "text",
    "ProviderName": "text",
    "PublisherName": "text",
    "RegionId": "text",
    "RegionName": "text",
    "ResourceId": "text",
    "ResourceName": "text",
    "ResourceType": "text",
    "ServiceCategory": "text",
    "ServiceName": "text",
    "ServiceProviderName": "text",
    "ServiceSubcategory": "text",
    "SkuId": "text",
    "SkuMeter": "text",
    "SkuPriceDetails": "text",
    "SkuPriceId": "text",
    "SubAccountId": "text",
    "SubAccountName": "text",
    "SubAccountType": "text",
    "Tags": "text",
    "x_Key": "text",
    "x_PriceVersion": "text",
    "x_Tier": "text",
}
"""Each column and its kind (`report_forms.write_parquet`). Those that begin with `x_` are ours, as FOCUS provides."""

_NAME = "tierway"
_CHOSEN_BY_OTHERS = (
    "ChargeDescription", "ResourceId", "ResourceName", "SkuId", "SkuPriceId", "SubAccountId", "SubAccountName", "x_Key",
    "x_Tier",
)  # fmt: skip
_METERS = (
    ("Input Tokens", "input_nusd"),
    ("Cached Input Tokens", "cached_input_nusd"),
    ("Output Tokens", "output_nusd"),
)
_GPU_TIME = "GPU Time"
_NAMES = (
    "e.key_name", "e.team", "a.tier", "a.backend", "a.model", "a.price_version", "e.tags", "e.metadata",
)  # fmt: skip
_MILLION = 1_000_000
_NUSD = 1_000_000_000


class _Used(msgspec.Struct, frozen=True):
    """Whose it was, and where. `start_ms` is when the hour or day begins."""

    start_ms: int
    key: str | None
    team: str | None
    tier: str
    backend: str
    model: str | None
    price_version: str
    tags: str
    metadata: str


class _Price(msgspec.Struct, frozen=True):
    kind: str
    parts_nusd: tuple[int, int, int]
    hour_nusd: int | None


def charges(reading: Reading, query: Query) -> list[Record]:
    """Return the charges of a period, in order of time, by hour if `query.bucket` is that and else by day, in UTC."""
    bucket: Bucket = "hour" if query.bucket == "hour" else "day"
    spans = spans_of(msgspec.structs.replace(query, timezone="UTC"))
    prices = _prices(reading)
    used: dict[_Used, list[int]] = {}
    for span in spans:
        for row in _rows(reading, _tokens(span, bucket)):
            _add(used, _used(row, bucket), row[9:])
        for row in _rows(reading, _changes(span, bucket)):
            _add(used, _used(row, bucket), (0, 0, 0, 0, 0, 0, row[9]))
    found = [
        charge
        for one, amounts in used.items()
        for charge in _charges(one, amounts, prices.get(one.price_version), bucket)
    ]
    found += _beside(reading, query, bucket)
    found.sort(key=lambda one: (str(one["ChargePeriodStart"]), str(one["SkuPriceId"]), str(one["x_Key"])))
    return found


def as_csv(found: list[Record]) -> bytes:
    """Render charges as CSV; what is null is an empty field."""
    return written_csv(list(COLUMNS), found, texts=_CHOSEN_BY_OTHERS)


def as_parquet(found: list[Record], out: BinaryIO) -> None:
    """Write charges as parquet. Raises `NoParquet`."""
    write_parquet(COLUMNS, found, out)


# -- what was used ----------------------------------------------------------------------------------------------------


def _tokens(span: Span, bucket: Bucket) -> sql.Statement:
    names = ", ".join(_NAMES)
    return sql.Statement(
        f"SELECT {sql.bucket_number(bucket, span, 'e.')}, {names}, "
        "SUM(a.prompt_tokens - a.cached_prompt_tokens), SUM(a.cached_prompt_tokens), SUM(a.completion_tokens), "
        "SUM(a.input_nusd), SUM(a.cached_input_nusd), SUM(a.output_nusd), SUM(a.gpu_nusd) "
        "FROM exchanges e JOIN attempts a ON a.exchange_id = e.exchange_id "
        f"WHERE {sql.within(span, 'e.')} GROUP BY 1, {names}"
    )


def _changes(span: Span, bucket: Bucket) -> sql.Statement:
    names = ", ".join(_NAMES)
    return sql.Statement(
        f"SELECT {sql.bucket_number(bucket, span, 'e.')}, {names}, SUM(j.change_nusd) "
        "FROM adjustments j JOIN exchanges e ON e.exchange_id = j.exchange_id "
        "JOIN attempts a ON a.exchange_id = j.exchange_id AND a.number = j.number "
        f"WHERE {sql.within(span, 'j.')} GROUP BY 1, {names}"
    )


def _rows(reading: Reading, statement: sql.Statement) -> Iterator[tuple[Value, ...]]:
    return reading.rows(statement.sql, statement.values)


def _used(row: tuple[Value, ...], bucket: Bucket) -> _Used:
    number = _int(row[0])
    return _Used(
        number if bucket == "hour" else number * DAY_MS,
        _text(row[1]),
        _text(row[2]),
        str(row[3]),
        str(row[4]),
        _text(row[5]),
        str(row[6]),
        str(row[7]),
        str(row[8]),
    )


def _add(used: dict[_Used, list[int]], one: _Used, amounts: tuple[Value, ...]) -> None:
    found = used.setdefault(one, [0] * 7)
    found[:] = [amount + _int(more) for amount, more in zip(found, amounts, strict=True)]


def _prices(reading: Reading) -> dict[str, _Price]:
    rows = reading.rows("SELECT version, kind, input_nusd, cached_input_nusd, output_nusd, hour_nusd FROM prices")
    return {
        str(row[0]): _Price(
            str(row[1]), (_int(row[2]), _int(row[3]), _int(row[4])), None if row[5] is None else _int(row[5])
        )
        for row in rows
    }


# -- lines ------------------------------------------------------------------------------------------------------------


def _charges(one: _Used, amounts: list[int], price: _Price | None, bucket: Bucket) -> Iterator[Record]:
    gpu_nusd = amounts[6]
    hour_nusd = None if price is None else price.hour_nusd
    if gpu_nusd:
        yield _line(one, bucket, _GPU_TIME, gpu_nusd, **_hours(gpu_nusd, hour_nusd))
    if price is not None and price.kind == "gpu":
        return
    for place, (meter, _) in enumerate(_METERS):
        tokens, nusd = amounts[place], amounts[3 + place]
        if tokens or nusd:
            yield _line(
                one, bucket, meter, nusd, **_priced(tokens, nusd, None if price is None else price.parts_nusd[place])
            )


def _priced(tokens: int, nusd: int, unit_nusd: int | None) -> Record:
    list_cost = usd(nusd) if unit_nusd is None else _decimal(tokens * unit_nusd, 15)
    return {
        "ConsumedQuantity": str(tokens),
        "ConsumedUnit": "Tokens",
        "PricingQuantity": _decimal(tokens, 6),
        "PricingUnit": "1000000 Tokens",
        "ListUnitPrice": None if unit_nusd is None else usd(unit_nusd),
        "ContractedUnitPrice": None if unit_nusd is None else usd(unit_nusd),
        "ListCost": list_cost,
        "ContractedCost": list_cost,
    }


def _hours(nusd: int, hour_nusd: int | None) -> Record:
    """Return time of a server: what it cost, over what an hour costs, to nine places."""
    billionths = 0 if not hour_nusd else (2 * nusd * _NUSD + hour_nusd) // (2 * hour_nusd)
    list_cost = _decimal(billionths * hour_nusd, 18) if hour_nusd else usd(nusd)
    return {
        "ConsumedQuantity": _decimal(billionths, 9),
        "ConsumedUnit": "Hours",
        "PricingQuantity": _decimal(billionths, 9),
        "PricingUnit": "Hours",
        "ListUnitPrice": usd(hour_nusd) if hour_nusd else None,
        "ContractedUnitPrice": usd(hour_nusd) if hour_nusd else None,
        "ListCost": list_cost,
        "ContractedCost": list_cost,
    }


def _line(one: _Used, bucket: Bucket, meter: str, nusd: int, **priced: str | int | None) -> Record:
    month = datetime.fromtimestamp(one.start_ms / 1000, UTC).replace(day=1, hour=0, minute=0, second=0)
    next_month = month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)
    end_ms = one.start_ms + (HOUR_MS if bucket == "hour" else DAY_MS)
    sku = f"{one.tier}/{meter.lower().replace(' ', '-')}"
    details = {"x_Tier": one.tier} if one.model is None else {"ModelId": one.model, "x_Tier": one.tier}
    # A tag without a value is true, as FOCUS wants it.
    tags: dict[str, str | bool] = dict.fromkeys(msgspec.json.decode(one.tags, type=list[str]), True)
    tags |= msgspec.json.decode(one.metadata, type=dict[str, str])
    return {
        **dict.fromkeys(COLUMNS),
        "BilledCost": usd(nusd),
        "EffectiveCost": usd(nusd),
        "BillingAccountId": _NAME,
        "BillingAccountName": _NAME,
        "BillingAccountType": "Gateway",
        "BillingCurrency": "USD",
        "BillingPeriodStart": _moment(month),
        "BillingPeriodEnd": _moment(next_month),
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{meter} of {one.model or one.tier} at {one.backend}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": _moment(datetime.fromtimestamp(one.start_ms / 1000, UTC)),
        "ChargePeriodEnd": _moment(datetime.fromtimestamp(end_ms / 1000, UTC)),
        "HostProviderName": _NAME,
        "InvoiceIssuerName": _NAME,
        "PricingCategory": "Dynamic" if meter == _GPU_TIME else "Standard",
        "PricingCurrency": "USD",
        "ProviderName": _NAME,
        "PublisherName": _NAME,
        "ServiceProviderName": _NAME,
        "ResourceId": one.backend,
        "ResourceName": one.backend,
        "ResourceType": "Model Server",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "LLM Gateway",
        "ServiceSubcategory": "Generative AI",
        "SkuId": sku,
        "SkuMeter": meter,
        "SkuPriceId": f"{sku}/{one.backend}",
        "SkuPriceDetails": msgspec.json.encode(details).decode(),
        "SubAccountId": one.team,
        "SubAccountName": one.team,
        "SubAccountType": None if one.team is None else "Team",
        "Tags": msgspec.json.encode(tags).decode(),
        "x_Key": one.key,
        "x_PriceVersion": one.price_version,
        "x_Tier": one.tier,
        **priced,
    }


def _beside(reading: Reading, query: Query, bucket: Bucket) -> Iterator[Record]:
    """Yield what servers cost beside the requests, as their hours were closed last."""
    size_ms = HOUR_MS if bucket == "hour" else DAY_MS
    hours = -(-query.since_ms // HOUR_MS), -(-query.until_ms // HOUR_MS)
    last = {
        (str(row[0]), _int(row[1])): row
        for row in reading.rows(
            "SELECT backend, hour, tier, hour_nusd, idle_nusd, outside_nusd, price_version FROM closings "
            f"WHERE hour >= {hours[0]} AND hour < {hours[1]} ORDER BY backend, hour, revision"
        )
    }
    sums: dict[tuple[_Used, int, str], int] = {}
    for (backend, hour), row in last.items():
        start_ms = hour * HOUR_MS // size_ms * size_ms
        one = _Used(start_ms, None, None, str(row[2]), backend, None, str(row[6]), "[]", "{}")
        for meter, nusd in (("GPU Idle Time", _int(row[4])), ("GPU Time Outside", _int(row[5]))):
            if nusd:
                sums[one, _int(row[3]), meter] = sums.get((one, _int(row[3]), meter), 0) + nusd
    for (one, hour_nusd, meter), nusd in sums.items():
        yield _line(one, bucket, meter, nusd, **_hours(nusd, hour_nusd))


def _moment(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _decimal(amount: int, places: int) -> str:
    """Return an amount of the smallest unit of so many places as a decimal number, exact."""
    whole, rest = divmod(abs(amount), 10**places)
    text = f"{whole}.{rest:0{places}d}".rstrip("0").rstrip(".")
    return f"-{text}" if amount < 0 else text


def _text(value: Value) -> str | None:
    return None if value is None else str(value)


def _int(value: Value) -> int:
    return int(value) if value is not None else 0
