"""Do provisional prices follow the work that the ledger tells of, that of all replicas, each once?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gateway.ledger.contract import LedgerDown
from gateway.ledger.rows import AnyRow, MeterRow
from gateway.ledger.sqlite import SqliteStore
from gateway.ledger.trailing import Trailing
from gateway.pricing import HourPrice
from policies.gpu import HOUR_MS
from tests.gateway.ledger.test_closing import FROM_MS, HOUR, USD, bill, price_of


class Told:
    """A price list that only remembers."""

    def __init__(self) -> None:
        self.hour = price_of()
        self.prices: list[tuple[int, int, int]] = []

    def hours(self, now_s: float) -> Mapping[str, HourPrice]:
        return {"gpu-a": self.hour}

    def set_provisional(
        self, backend: str, *, input_nusd: int, cached_input_nusd: int, output_nusd: int, now_s: float
    ) -> None:
        assert backend == "gpu-a"
        self.prices.append((input_nusd, cached_input_nusd, output_nusd))


class Play:
    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.told = Told()
        self.now_s = 0.0
        self.trailing = Trailing(store, self.told, now_s=lambda: FROM_MS / 1000 + self.now_s)

    def look(self, now_s: float) -> list[tuple[int, int, int]]:
        """Return what was told this time."""
        self.now_s = now_s
        self.told.prices.clear()
        asyncio.run(self.trailing.look())
        return list(self.told.prices)

    def ran(self, number: int, from_s: float, took_s: float, *, prompt: int = 1000) -> None:
        rows = bill(number, from_s, from_s + took_s, prompt_tokens=prompt, completion_tokens=0)
        self.store.write(rows)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    store = SqliteStore(tmp_path / "ledger.db")
    store.open()
    try:
        yield Play(store)
    finally:
        store.close()


def test_a_price_comes_of_what_was_measured_and_is_told_when_it_moves(play: Play) -> None:
    assert play.look(0) == []
    play.ran(1, 0, 10)
    # 10 s of the two dollars of an hour for 1,000 prompt tokens; a completion token is worth ten of them at first.
    assert play.look(60) == [(5_600_000_000, 0, 56_000_000_000)]
    assert play.look(120) == []
    play.ran(2, 20, 10, prompt=1100)
    assert play.look(180) == [], "less than a tenth off"
    play.ran(3, 40, 10, prompt=4000)
    assert play.look(240) == [(2_700_000_000, 0, 27_000_000_000)]
    play.told.hour = price_of(hour_nusd=4 * USD)
    assert play.look(300) == [(5_500_000_000, 0, 55_000_000_000)]


def test_a_new_process_starts_with_what_the_ledger_tells(play: Play) -> None:
    play.ran(1, 0, 10)
    play.look(60)
    again = Play(play.store)
    assert again.look(5 * 3600) == [(5_600_000_000, 0, 56_000_000_000)]


def test_an_attempt_counts_once_however_often_it_is_read(play: Play) -> None:
    play.ran(1, 0, 10)
    play.look(20)
    for now_s in range(80, 900, 60):
        assert play.look(now_s) == []
    assert len(play.trailing._servers["gpu-a"].trail.runs) == 1
    assert play.trailing._servers["gpu-a"].seen == {}


def test_work_that_was_not_ours_makes_tokens_cheaper(play: Play) -> None:
    play.ran(1, 0, 10)
    rows: list[AnyRow] = [
        MeterRow(
            backend="gpu-a",
            hour=HOUR,
            instance=watcher,
            from_ms=FROM_MS,
            until_ms=FROM_MS + 60_000,
            prompt_tokens=4000,
            completion_tokens=0,
            busy_ms=20_000,
            ready_ms=60_000,
            restarts=0,
        )
        for watcher in ("one", "two")
    ]
    play.store.write(rows)
    assert play.look(60) == [(2_800_000_000, 0, 28_000_000_000)]


def test_a_ledger_that_cannot_be_read_leaves_prices_as_they_are(tmp_path: Path) -> None:
    play = Play(SqliteStore(tmp_path / "none.db"))
    with pytest.raises(LedgerDown):
        play.look(HOUR_MS)
    assert play.told.prices == []
