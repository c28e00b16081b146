"""Is every event one line, whatever is in it?"""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import pytest

from gateway.log import ExchangeLog


class Written:
    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, line: bytes, /) -> None:
        self.writes.append(line)


def lines_of(paths: list[str], form: Literal["json", "text"], level: str = "info") -> Written:
    written = Written()

    async def log() -> None:
        log = ExchangeLog(written, format=form, level=level)
        for path in paths:
            log.refused(request_id="r", key=None, path=path, code="unknown_url", status=404)
        log.flush()

    asyncio.run(log())
    return written


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("path", ["/a\n12:00:00 exchange key=forged", "/\x1b[2J", "/\r", "/é", "/\u2028"])
def test_what_a_client_sends_cannot_begin_a_line(form: Literal["json", "text"], path: str) -> None:
    (write,) = lines_of([path], form).writes
    assert write.count(b"\n") == 1
    assert len(write.decode().splitlines()) == 1 or form == "json"
    assert b"\x1b" not in write


def test_lines_that_come_together_are_written_at_once() -> None:
    (write,) = lines_of(["/a", "/b", "/c"], "json").writes
    assert [json.loads(line)["path"] for line in write.splitlines()] == ["/a", "/b", "/c"]


def test_a_log_of_warnings_has_no_exchanges() -> None:
    assert not lines_of(["/a"], "json", "warning").writes
