"""Is what machines read exact, what people read clear, and nothing of it a formula?"""

from __future__ import annotations

import csv
import io
import json
import sys
from datetime import UTC, datetime
from decimal import Decimal

import msgspec
import pytest
from pyarrow import parquet

from gateway.ledger.report_forecast import MonthForecast
from gateway.ledger.report_forms import NoParquet, as_json, report_csv, report_parquet, safe
from gateway.ledger.report_query import DAY_MS, Query
from gateway.ledger.report_servers import Server
from gateway.ledger.report_table import as_table
from gateway.ledger.reports import Line, Refused, Report
from policies.forecast import Forecast

AT_MS = 1_793_491_200_000  # 2026-11-01
QUERY = Query(since_ms=AT_MS, until_ms=AT_MS + 2 * DAY_MS, by=("user", "tier"), bucket="day")
LINES = (
    Line(start_ms=AT_MS, names=("=cmd|' /C calc'!A0", "small"), exchanges=3, answered=2, failed=1, calls=4,
         prompt_tokens=1_234_567, completion_tokens=89, input_nusd=1_500_000_001, adjusted_nusd=-1, wasted_nusd=250_000_000,
         baseline_nusd=9_000_000_000, estimated=1, provisional_nusd=5, idle_nusd=2_000_000),
    Line(start_ms=AT_MS + DAY_MS, names=(None, "large"), exchanges=1, calls=1, output_nusd=7, baseline_nusd=3),
)  # fmt: skip
TOTAL = Line(
    exchanges=4, answered=2, failed=1, calls=5, estimated=1, prompt_tokens=1_234_567, completion_tokens=89,
    input_nusd=1_500_000_001, output_nusd=7, adjusted_nusd=-1, wasted_nusd=250_000_000, baseline_nusd=9_000_000_003,
    provisional_nusd=5, idle_nusd=2_000_000,
)  # fmt: skip
REPORT = Report(
    query=QUERY,
    lines=LINES,
    total=TOTAL,
    servers=(
        Server(backend="gpu-1", tier="small", hours=3, hour_nusd=9_000_000_000, shares_nusd=4, idle_nusd=5,
               outside_nusd=8_999_999_991, busy_ms=1500),
    ),
    idle_left_nusd=5,
    refused=(Refused("rate_limit_exceeded", 12),),
)  # fmt: skip
MONTH = MonthForecast(
    since_ms=AT_MS,
    until_ms=AT_MS + 30 * DAY_MS,
    now_ms=AT_MS + DAY_MS,
    forecast=Forecast(spent_nusd=1, expected_nusd=30_000_000_000, low_nusd=2, high_nusd=60_000_000_000, hours=24),
)


def test_csv_has_exact_dollars_and_names_that_are_no_formulas() -> None:
    rows = list(csv.DictReader(io.StringIO(report_csv(REPORT, LINES).decode())))
    assert [row["start"] for row in rows] == ["2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z"]
    assert rows[0]["user"] == "'=cmd|' /C calc'!A0"
    assert rows[1]["user"] == ""
    assert (rows[0]["input_usd"], rows[0]["adjusted_usd"]) == ("1.500000001", "-0.000000001")
    assert (rows[0]["cost_usd"], rows[0]["cost_per_answer_usd"]) == ("1.5", "0.75")
    assert rows[1]["savings_usd"] == "-0.000000004"
    assert rows[1]["cost_per_answer_usd"] == ""


@pytest.mark.parametrize("name", ["=1", "+1", "-1", "@x", "\t=1", "\r=1"])
def test_whatever_a_spreadsheet_takes_for_a_formula_is_quoted(name: str) -> None:
    assert safe(name) == f"'{name}"


@pytest.mark.parametrize("name", ["alice", "a=1", "1-2", "", None, -5])
def test_other_cells_stay_as_they_are(name: str | int | None) -> None:
    assert safe(name) == name


def test_an_empty_report_has_a_head() -> None:
    nothing = msgspec.structs.replace(REPORT, lines=(), total=Line())
    assert report_csv(nothing, ()).decode().startswith("start,user,tier,exchanges,")
    assert "Nothing was asked" in as_table(nothing)


def test_json_says_the_same_and_what_to_make_of_it() -> None:
    said = json.loads(as_json(REPORT, forecast=MONTH))
    assert said["object"] == "tierway.costs"
    assert said["data"][0]["user"] == "=cmd|' /C calc'!A0"
    assert said["total"]["cost_usd"] == "1.500000007"
    assert said["total"]["savings_usd"] == "7.499999996"
    assert said["servers"][0]["idle_usd"] == "0.000000005"
    assert said["refused"] == {"rate_limit_exceeded": 12}
    assert said["forecast"]["expected_usd"] == "30"
    assert any("might have answered longer or shorter" in note for note in said["notes"])
    assert any("provisional" in note for note in said["notes"])
    assert any("1 of 4 requests are estimated" in note for note in said["notes"])


def test_parquet_keeps_money_as_decimals() -> None:
    out = io.BytesIO()
    report_parquet(REPORT, LINES, out)
    table = parquet.read_table(out)
    assert str(table.schema.field("cost_usd").type) == "decimal128(38, 9)"
    assert table.column("cost_usd").to_pylist() == [Decimal("1.5"), Decimal("0.000000007")]
    assert table.column("user").to_pylist() == ["=cmd|' /C calc'!A0", None]
    assert table.column("exchanges").to_pylist() == [3, 1]


def test_a_time_of_parquet_is_one_of_utc() -> None:
    from gateway.ledger.report_forms import write_parquet  # noqa: PLC0415 - beside what it is about

    out = io.BytesIO()
    write_parquet({"at": "time"}, [{"at": "2026-11-01T00:00:00Z"}, {"at": None}], out)
    assert parquet.read_table(out).column("at").to_pylist() == [datetime(2026, 11, 1, tzinfo=UTC), None]


def test_without_pyarrow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(NoParquet, match=r"tierway\[parquet\]"):
        report_parquet(REPORT, LINES, io.BytesIO())


def test_a_table_reads_well() -> None:
    assert as_table(REPORT, forecast=MONTH) == TABLE


TABLE = """\
2026-11-01T00:00:00Z to 2026-11-03T00:00:00Z, UTC

day         user                tier   requests  answered  calls  tokens in  tokens out    cost $ + idle  wasted $  saved $  $ an answer
----------  ------------------  -----  --------  --------  -----  ---------  ----------  ---------------  --------  -------  -----------
2026-11-01  =cmd|' /C calc'!A0  small         3    66.7 %      4  1,234,567          89  1.5000 + 0.0020    0.2500   7.5000     0.750000
2026-11-02  -                   large         1     0.0 %      1          0           0           0.0000    0.0000   0.0000            -
----------  ------------------  -----  --------  --------  -----  ---------  ----------  ---------------  --------  -------  -----------
total                                         4    50.0 %      5  1,234,567          89  1.5000 + 0.0020    0.2500   7.5000     0.750000

The dearest tier of each route alone would have cost $9.0000: $7.5000 (83 %) was saved.
The tokens of the answers that were shown were repriced: a larger model might have answered longer or shorter.
$0.000000005 of GPU time is provisional: its hours are not closed yet.
1 of 4 requests are estimated: their process died before it could bill them.
GPU servers stood idle for $0.000000005, which is in no line.
GPU servers did work that was not tierway's for $8.999999991, which is in no line.
Server gpu-1: 3 closed hours for $9: shares $0.000000004, idle $0.000000005, outside $8.999999991.
Refused: 12 rate_limit_exceeded.
By the end of the month: $30.0000 (four times of five $0.0000 to $60.0000), of which $0.0000 is spent; learned from 24 hours.
"""


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    line = msgspec.structs.replace(LINES[0], names=("\x1b[31mred", "small"))
    shown = as_table(msgspec.structs.replace(REPORT, lines=(line,)))
    assert "\x1b" not in shown
    assert "?[31mred" in shown
