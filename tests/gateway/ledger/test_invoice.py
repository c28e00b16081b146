"""Is an invoice read as it was meant, and is every difference to the ledger found and none made up?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from gateway.ledger.invoice import BadLine, Comparison, InvoiceError, Line, compare, read_invoice
from gateway.ledger.sqlite import SqliteStore
from tests.gateway.ledger.bills import AT_MS, bill_of, rows_of

# Every call of `bills` is of a/model, and has 12 tokens in and 7 out. Its day:
DAY = "2025-10-09"


def read(text: str, **columns: str) -> list[Line | BadLine]:
    return list(read_invoice(text.splitlines(keepends=True), columns))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "ledger.db", shared=False)
    store.open()
    for number in range(4):
        store.write(rows_of(bill_of(number, attempts=2, output=1_000_000)))
    yield store
    store.close()


def compared(store: SqliteStore, text: str, *, tolerance_nusd: int = 0) -> Comparison:
    with store.reading() as reading:
        return compare(reading, read_invoice(text.splitlines(keepends=True)), tolerance_nusd=tolerance_nusd)


def counts(result: Comparison) -> tuple[int, int, int, int, int]:
    return (
        result.matched,
        len(result.differing),
        len(result.only_invoice),
        len(result.only_ledger),
        len(result.bad),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("date,model,amount\n2026-11-01,m,1.5\n", Line(number=2, day=20_758, model="m", nusd=1_500_000_000)),
        (
            '\ufeffTimestamp;x,Model,Net (USD)\n2026-11-01T23:59:59-05:00,m,"$1,000.000000001"\n',
            None,
        ),
        (
            (
                "Usage Date,model_name,input_tokens,cached_tokens,output_tokens,Amount USD,Request ID\n"
                "1793491200,m,10,,20.0,-0.25,abc\n"
            ),
            Line(number=2, day=20_758, model="m", nusd=-250_000_000, input_tokens=10, output_tokens=20, request="abc"),
        ),
        (
            "BilledCost,BillingCurrency,ChargePeriodStart,ChargePeriodEnd,SkuId\n0.1,USD,2026-11-01T05:00:00Z,x,m\n",
            Line(number=2, day=20_758, model="m", nusd=100_000_000),
        ),
    ],
)
def test_columns_are_known_by_their_headers(text: str, expected: Line | None) -> None:
    if expected is None:
        with pytest.raises(InvoiceError, match="no column is known to be the time or the amount"):
            read(text)
        (line,) = read(text, time="Timestamp;x", amount="Net (USD)")
        assert isinstance(line, Line)
        assert (line.day, line.nusd) == (20_759, 1_000_000_000_001)
    else:
        assert read(text) == [expected]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("yesterday,m,1,USD,5", "line 2, date: 'yesterday' is no date"),
        ("2026-11-01,,1,USD,5", "line 2, model: it is empty"),
        ("2026-11-01,m,one,USD,5", "line 2, amount: 'one' is no amount"),
        ("2026-11-01,m,NaN,USD,5", "line 2, amount: 'NaN' is no amount"),
        ("2026-11-01,m,1e40,USD,5", "line 2, amount: '1e40' is no amount"),
        ("2026-11-01,m,1,EUR,5", "line 2, currency: EUR is not dollars"),
        ("2026-11-01,m,1,USD,-5", "line 2, output_tokens: '-5' is no number of tokens"),
        ("2026-11-01,m,1,USD,½", "line 2, output_tokens: '½' is no number of tokens"),
        ("2026-11-01,m", "line 2, currency: it is not there"),
    ],
)
def test_a_bad_line_is_named_with_its_column_and_the_others_are_read(cells: str, said: str) -> None:
    bad, good = read(f"date,model,amount,currency,output_tokens\n{cells}\n2026-11-01,m,1,USD,\n\n")
    assert isinstance(bad, BadLine)
    assert str(bad).startswith(said)
    assert isinstance(good, Line)


def test_a_file_without_what_is_needed_is_refused() -> None:
    with pytest.raises(InvoiceError, match="empty"):
        read("")
    with pytest.raises(InvoiceError, match="there is no column 'Net'"):
        read("date,model,amount\n", amount="Net")


def test_days_of_models_that_agree_agree(store: SqliteStore) -> None:
    result = compared(store, f"date,model,input_tokens,output_tokens,amount\n{DAY},a/model,96,56,0.008\n")
    assert counts(result) == (1, 0, 0, 0, 0)
    assert result.invoice.nusd == result.ledger.nusd == 8_000_000


def test_what_differs_says_by_how_much(store: SqliteStore) -> None:
    text = (
        f"date,model,output_tokens,amount\n{DAY},a/model,28,0.005\n{DAY},a/model,28,0.003001\n"
        f"{DAY},other,1,0.5\n2025-10-08,a/model,1,0.25\n"
    )
    result = compared(store, text)
    assert counts(result) == (0, 1, 2, 0, 0)
    assert result.differing[0].what == f"{DAY} a/model"
    assert result.differing[0].over_nusd == 1000
    assert [one.over_nusd for one in result.only_invoice] == [250_000_000, 500_000_000]
    assert counts(compared(store, text, tolerance_nusd=1000))[:2] == (1, 0)


def test_tokens_that_differ_differ_at_the_same_price(store: SqliteStore) -> None:
    result = compared(store, f"date,model,input_tokens,amount\n{DAY},a/model,97,0.008\n")
    assert counts(result) == (0, 1, 0, 0, 0)


def test_a_line_that_names_its_request_is_compared_with_that(store: SqliteStore) -> None:
    first, second, third = (bill_of(number).exchange.exchange_id for number in range(3))
    result = compared(
        store,
        "date,model,amount,request_id\n"
        f"{DAY},a/model,0.001,{first}/1\n"
        f"{DAY},a/model,0.002,{first}/2\n"
        f"{DAY},a/model,0.002,{second}\n"
        f"{DAY},a/model,0.002,unheard-of\n"
        f"{DAY},a/model,0.002,{third}\n{DAY},a/model,0.002,{third}\n",
    )
    assert counts(result) == (2, 2, 1, 1, 0)
    assert [(one.what, one.over_nusd) for one in result.differing] == [(f"{first}/2", 1_000_000), (third, 2_000_000)]
    # Of that day the calls of the fourth exchange are on no line.
    (rest,) = result.only_ledger
    assert rest.ledger is not None
    assert (rest.what, rest.ledger.count, rest.ledger.nusd) == (f"{DAY} a/model", 2, 2_000_000)
    assert result.ledger.nusd == 8_000_000


def test_servers_that_cost_by_the_hour_are_no_providers(store: SqliteStore) -> None:
    gpu = bill_of(9)
    attempts = [msgspec.structs.replace(one, output_nusd=0, gpu_nusd=5) for one in gpu.attempts]
    store.write([gpu.exchange, *attempts])
    assert counts(compared(store, f"date,model,amount\n{DAY},a/model,0.008\n")) == (1, 0, 0, 0, 0)


def test_the_day_of_these_rows_is_the_day_of_the_invoice() -> None:
    assert read(f"date,model,amount\n{DAY},m,1\n")[0].day == AT_MS // 86_400_000  # type: ignore[union-attr]
