"""Does a provider ask for what we have used? Its invoice as CSV, compared with the ledger line by line.

A line that names a request is compared with that call; lines that do not are added up by day (UTC) and model, and
compared with the calls of that day and model. Columns are found by their headers; those of FOCUS are known too. What
calls cost by the hour of a server is no provider's, and left out.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from itertools import islice

import msgspec

from gateway.ledger.contract import Reading

_DAY_MS = 86_400_000
_AT_ONCE = 250
_NUSD = Decimal(1_000_000_000)
_LARGEST = Decimal(9_000_000)

# Headers by what they mean, as `_bare` makes them.
_HEADERS: Mapping[str, tuple[str, ...]] = {
    "time": (
        "time",
        "date",
        "day",
        "timestamp",
        "usagedate",
        "usagetime",
        "chargeperiodstart",
        "starttime",
        "createdat",
    ),
    "model": ("model", "modelname", "modelid", "snapshotid", "skuid", "resourcename", "resourceid", "lineitem"),
    "input": ("inputtokens", "prompttokens", "ncontexttokenstotal", "inputtokenstotal", "contexttokens"),
    "cached": ("cachedtokens", "cachedinputtokens", "inputcachedtokens", "cachedprompttokens", "cachereadinputtokens"),
    "output": ("outputtokens", "completiontokens", "ngeneratedtokenstotal", "generatedtokens"),
    "amount": ("billedcost", "amount", "cost", "costusd", "amountusd", "totalcost", "total", "price", "effectivecost"),
    "currency": ("currency", "billingcurrency", "amountcurrency"),
    "request": ("requestid", "request", "xrequestid", "clientrequestid", "exchangeid"),
}
_REQUIRED = ("time", "model", "amount")


class InvoiceError(ValueError):
    """The file is no invoice that can be read; the message says why."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of an invoice. `number` is that of the file. Tokens are None where the invoice does not say."""

    number: int
    day: int
    model: str
    nusd: int
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    request: str = ""


class BadLine(msgspec.Struct, frozen=True):
    """A line that cannot be read, and the column in which it cannot."""

    number: int
    column: str
    why: str

    def __str__(self) -> str:
        return f"line {self.number}, {self.column}: {self.why}"


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """What some lines, or some calls, come to. Tokens are None where they are not known."""

    nusd: int = 0
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    count: int = 0

    def plus(self, other: Sums) -> Sums:
        """Return both together."""
        return Sums(
            nusd=self.nusd + other.nusd,
            input_tokens=_plus(self.input_tokens, other.input_tokens),
            cached_tokens=_plus(self.cached_tokens, other.cached_tokens),
            output_tokens=_plus(self.output_tokens, other.output_tokens),
            count=self.count + other.count,
        )


class Matter(msgspec.Struct, frozen=True, kw_only=True):
    """A request, or a day and model: what the invoice has of it and what the ledger has, None: nothing."""

    what: str
    invoice: Sums | None
    ledger: Sums | None

    @property
    def over_nusd(self) -> int:
        """How much more the invoice asks for than the ledger has."""
        return (0 if self.invoice is None else self.invoice.nusd) - (0 if self.ledger is None else self.ledger.nusd)

    def differs(self, tolerance_nusd: int) -> bool:
        """Whether the two say something else."""
        mine, its = self.ledger, self.invoice
        if mine is None or its is None:
            return True
        tokens = ("input_tokens", "cached_tokens", "output_tokens")
        said = [(getattr(its, name), getattr(mine, name)) for name in tokens]
        return abs(self.over_nusd) > tolerance_nusd or any(one is not None and one != other for one, other in said)


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. `matched` counts requests, and days of models, of which both say the same."""

    matched: int
    differing: tuple[Matter, ...]
    only_invoice: tuple[Matter, ...]
    only_ledger: tuple[Matter, ...]
    bad: tuple[BadLine, ...]
    invoice: Sums
    ledger: Sums


def read_invoice(lines: Iterable[str], columns: Mapping[str, str] | None = None) -> Iterator[Line | BadLine]:
    """Read a file of CSV with a header. `columns` names headers that are not known: `{"amount": "Net (USD)"}`.

    Raises `InvoiceError` where a column that is needed is not there, or the file has no header.
    """
    reader = csv.reader(lines)
    try:
        header = [one.removeprefix("\ufeff").strip() for one in next(reader)]
    except StopIteration:
        raise InvoiceError("the file is empty") from None
    except csv.Error as error:
        raise InvoiceError(f"line 1: {error}") from None
    places = _places(header, columns or {})
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadLine(reader.line_num, "the whole line", str(error))
            continue
        if any(cell.strip() for cell in cells):
            yield _line(reader.line_num, cells, header, places)


def _places(header: Sequence[str], columns: Mapping[str, str]) -> dict[str, int]:
    bare = [_bare(one) for one in header]
    places: dict[str, int] = {}
    for meaning, names in _HEADERS.items():
        wanted = (_bare(columns[meaning]),) if meaning in columns else names
        found = next((bare.index(name) for name in wanted if name in bare), None)
        if found is not None:
            places[meaning] = found
        elif meaning in columns:
            raise InvoiceError(f"there is no column '{columns[meaning]}'; there are {', '.join(header)}")
    missing = [meaning for meaning in _REQUIRED if meaning not in places]
    if missing:
        raise InvoiceError(
            f"no column is known to be the {' or the '.join(missing)}: say which, as {missing[0]}=NAME. "
            f"There are {', '.join(header)}"
        )
    return places


def _line(number: int, cells: Sequence[str], header: Sequence[str], places: Mapping[str, int]) -> Line | BadLine:
    meaning = "time"

    def cell(name: str) -> str:
        nonlocal meaning
        meaning = name
        place = places.get(name)
        if place is None:
            return ""
        if place >= len(cells):
            raise ValueError("it is not there")
        return cells[place].strip()

    try:
        _check_dollars(cell("currency") or "USD")
        return Line(
            number=number,
            day=_day(cell("time")),
            model=_filled(cell("model")),
            nusd=_nusd(cell("amount")),
            input_tokens=_tokens(cell("input")),
            cached_tokens=_tokens(cell("cached")),
            output_tokens=_tokens(cell("output")),
            request=cell("request"),
        )
    except ValueError as error:
        return BadLine(number, header[places[meaning]] if meaning in places else meaning, str(error))


def _bare(header: str) -> str:
    return re.sub(r"[^a-z0-9]", "", header.lower())


def _check_dollars(currency: str) -> None:
    if currency.upper() not in ("USD", "$", "US$"):
        raise ValueError(f"{currency} is not dollars")


def _filled(text: str) -> str:
    if not text:
        raise ValueError("it is empty")
    return text


def _day(text: str) -> int:
    if re.fullmatch(r"\d{10}(\.\d+)?", text):
        return int(float(text) // 86_400)
    if re.fullmatch(r"\d{13}", text):
        return int(text) // _DAY_MS
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"'{text}' is no date like 2026-11-01 or 2026-11-01T12:00:00Z") from None
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    return int(at.timestamp() // 86_400)


def _nusd(text: str) -> int:
    try:
        amount = Decimal(text.replace("$", "").replace(",", "").replace("_", "").strip())
    except InvalidOperation:
        raise ValueError(f"'{text}' is no amount") from None
    if not amount.is_finite() or abs(amount) > _LARGEST:
        raise ValueError(f"'{text}' is no amount")
    return int((amount * _NUSD).to_integral_value())


def _tokens(text: str) -> int | None:
    if not text:
        return None
    bare = text.replace(",", "").removesuffix(".0")
    if not bare.isascii() or not bare.isdigit() or len(bare) > 15:
        raise ValueError(f"'{text}' is no number of tokens")
    return int(bare)


def _plus(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else one + other


# -- comparing --------------------------------------------------------------------------------------------------------

_CALL = (
    "a.exchange_id, a.number, a.model, a.ended_ms, a.prompt_tokens, a.cached_prompt_tokens, a.completion_tokens, "
    "a.input_nusd + a.cached_input_nusd + a.output_nusd"
)


def compare(reading: Reading, lines: Iterable[Line | BadLine], *, tolerance_nusd: int = 0) -> Comparison:
    """Compare an invoice with the ledger. Keeps what it finds in memory, so a day's sums and not a year's requests.

    Only models that are on the invoice are looked for in the ledger, from its first day to its last one.
    """
    bad: list[BadLine] = []
    requests: dict[str, Sums] = {}
    days: dict[tuple[int, str], Sums] = {}
    of_day: dict[tuple[int, str], Sums] = {}
    for line in lines:
        if isinstance(line, BadLine):
            bad.append(line)
            continue
        place = (line.day, line.model)
        of_day[place] = of_day.get(place, Sums()).plus(_sums_of(line))
        if line.request:
            requests[line.request] = requests.get(line.request, Sums()).plus(_sums_of(line))
        else:
            days[place] = days.get(place, Sums()).plus(_sums_of(line))
    called: dict[str, Sums] = {}
    taken: dict[tuple[int, str], Sums] = {}
    by_request = [_request(reading, ids, called, taken) for ids in _lots(requests)]
    matters = [Matter(what=id_, invoice=requests[id_], ledger=called.get(id_)) for ids in by_request for id_ in ids]
    for place, sums in sorted(_by_day(reading, of_day).items()):
        # Of a day what was named by a request is compared with that request.
        rest = _less(sums, taken.get(place))
        if place in days or rest.count:
            ledger = rest if rest.count else None
            matters.append(Matter(what=_said(place), invoice=days.pop(place, None), ledger=ledger))
    matters += [Matter(what=_said(place), invoice=sums, ledger=None) for place, sums in sorted(days.items())]
    return _sorted_out(matters, bad, tolerance_nusd)


def _sorted_out(matters: Sequence[Matter], bad: Sequence[BadLine], tolerance_nusd: int) -> Comparison:
    different = [one for one in matters if one.differs(tolerance_nusd)]
    nothing = Sums()
    invoice = ledger = nothing
    for one in matters:
        invoice = invoice.plus(one.invoice or nothing)
        ledger = ledger.plus(one.ledger or nothing)
    return Comparison(
        matched=len(matters) - len(different),
        differing=tuple(one for one in different if one.invoice is not None and one.ledger is not None),
        only_invoice=tuple(one for one in different if one.ledger is None),
        only_ledger=tuple(one for one in different if one.invoice is None),
        bad=tuple(bad),
        invoice=invoice,
        ledger=ledger,
    )


def _sums_of(line: Line) -> Sums:
    return Sums(
        nusd=line.nusd,
        input_tokens=line.input_tokens,
        cached_tokens=line.cached_tokens,
        output_tokens=line.output_tokens,
        count=1,
    )


def _less(sums: Sums, other: Sums | None) -> Sums:
    if other is None:
        return sums
    return Sums(
        nusd=sums.nusd - other.nusd,
        input_tokens=(sums.input_tokens or 0) - (other.input_tokens or 0),
        cached_tokens=(sums.cached_tokens or 0) - (other.cached_tokens or 0),
        output_tokens=(sums.output_tokens or 0) - (other.output_tokens or 0),
        count=sums.count - other.count,
    )


def _said(place: tuple[int, str]) -> str:
    return f"{datetime.fromtimestamp(place[0] * 86_400, UTC).date().isoformat()} {place[1]}"


def _lots(ids: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(ids)
    while some := list(islice(rest, _AT_ONCE)):
        yield some


def _request(
    reading: Reading, ids: list[str], called: dict[str, Sums], taken: dict[tuple[int, str], Sums]
) -> list[str]:
    """Find the calls of some requests, by the id of the exchange, of the call (`id/number`) or of the client."""
    exchanges = sorted({id_.partition("/")[0] for id_ in ids})
    places = ", ".join("?" * len(exchanges))
    query = (
        f"SELECT e.request_id, {_CALL} FROM exchanges e JOIN attempts a ON a.exchange_id = e.exchange_id "  # noqa: S608
        f"WHERE a.gpu_nusd = 0 AND a.outcome <> 'full' AND (e.exchange_id IN ({places}) OR e.request_id IN ({places}))"
    )
    wanted = set(ids)
    for request_id, exchange_id, number, model, ended_ms, prompt, cached, completion, nusd in reading.rows(
        query, (*exchanges, *exchanges)
    ):
        names = (f"{exchange_id!s}/{number!s}", str(exchange_id), str(request_id))
        name = next((one for one in names if one in wanted), None)
        if name is None:
            continue
        sums = Sums(
            nusd=_int(nusd),
            input_tokens=_int(prompt),
            cached_tokens=_int(cached),
            output_tokens=_int(completion),
            count=1,
        )
        called[name] = called.get(name, Sums()).plus(sums)
        place = (_int(ended_ms) // _DAY_MS, str(model))
        taken[place] = taken.get(place, Sums()).plus(sums)
    return ids


def _by_day(reading: Reading, invoiced: Mapping[tuple[int, str], Sums]) -> dict[tuple[int, str], Sums]:
    if not invoiced:
        return {}
    first, last = min(day for day, _ in invoiced), max(day for day, _ in invoiced)
    models = {model for _, model in invoiced}
    columns = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens")
    sums = ", ".join(f"CAST(SUM(a.{one}) AS BIGINT)" for one in columns)
    # Bills are made after their calls have ended, mostly at once; the index is on the time of the bill.
    query = (
        f"SELECT a.ended_ms / {_DAY_MS}, a.model, {sums}, "  # noqa: S608 - names of ours
        "CAST(SUM(a.input_nusd + a.cached_input_nusd + a.output_nusd) AS BIGINT), COUNT(*) FROM exchanges e "
        "JOIN attempts a ON a.exchange_id = e.exchange_id WHERE e.settled_ms >= ? AND e.settled_ms < ? "
        "AND a.ended_ms >= ? AND a.ended_ms < ? AND a.gpu_nusd = 0 AND a.outcome <> 'full' "
        f"GROUP BY a.ended_ms / {_DAY_MS}, a.model"
    )
    from_ms, until_ms = first * _DAY_MS, (last + 1) * _DAY_MS
    found = {}
    for day, model, prompt, cached, completion, nusd, count in reading.rows(
        query, (from_ms, until_ms + _DAY_MS, from_ms, until_ms)
    ):
        if model in models:
            found[_int(day), str(model)] = Sums(
                nusd=_int(nusd),
                input_tokens=_int(prompt),
                cached_tokens=_int(cached),
                output_tokens=_int(completion),
                count=_int(count),
            )
    return found


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value
