"""Does a stream fall into the same events wherever the network cuts it?"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends.sse import DONE, EventSplitter, data_of

RECORDED = sorted((Path(__file__).parents[1] / "contract").rglob("*.sse"))

lines = st.one_of(
    st.builds(
        lambda name, value: f"{name}{value}",
        st.sampled_from([": ", "data: ", "data:", "event: ", "id:", "x: "]),
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8),
    ),
    st.just("data: [DONE]"),
)
blocks = st.lists(lines, min_size=1, max_size=3)
line_ends = st.sampled_from(["\n", "\r\n", "\r"])


def expected_of(events: list[list[str]]) -> list[bytes]:
    return [("\n".join(event) + "\n\n").encode() for event in events]


def fed(parts: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = EventSplitter()
    events = [event for part in parts for event in splitter.feed(part)]
    return events, splitter.flush()


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(one % (len(data) + 1) for one in cuts)})
    return [data[first:last] for first, last in pairwise(edges)]


@given(st.lists(blocks, max_size=4), line_ends, st.lists(st.integers(0, 500)), st.integers(0, 3))
@example([[": keep-alive"], ["data: {}"]], "\r\n", [13, 14, 15, 16], 0)
@example([["data: a"]], "\r", [8, 9], 0)
def test_any_cut_of_the_same_bytes_gives_the_same_events(
    events: list[list[str]], line_end: str, cuts: list[int], surplus: int
) -> None:
    block = "".join("".join(line + line_end for line in event) + line_end * (1 + surplus) for event in events)
    found, rest = fed(cut(block.encode(), cuts))
    assert found == expected_of(events)
    assert not rest.strip()


@given(st.text("\r\na:", max_size=30), st.lists(st.integers(0, 500)))
def test_even_nonsense_is_cut_the_same_everywhere(text: str, cuts: list[int]) -> None:
    assert fed(cut(text.encode(), cuts)) == fed([text.encode()])


@given(st.binary(max_size=60), st.lists(st.integers(0, 500)))
def test_no_byte_is_lost_but_line_ends(data: bytes, cuts: list[int]) -> None:
    found, rest = fed(cut(data, cuts))
    assert (b"".join(found) + rest).translate(None, b"\r\n") == data.translate(None, b"\r\n")


@given(st.lists(blocks, max_size=4), line_ends, st.lists(st.integers(0, 500)))
def test_what_comes_out_is_a_stream_again(events: list[list[str]], line_end: str, cuts: list[int]) -> None:
    block = "".join("".join(line + line_end for line in event) + line_end for event in events)
    found, _ = fed(cut(block.encode(), cuts))
    assert fed([b"".join(found)])[0] == found


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recorded_streams_are_cut_into_what_was_sent(path: Path) -> None:
    raw = path.read_bytes()
    byte_by_byte, rest = fed([raw[at : at + 1] for at in range(len(raw))])
    whole, _ = fed([raw])
    assert byte_by_byte == whole
    assert rest == b""
    assert b"".join(whole) == raw
    for event in whole:
        payload = data_of(event)
        assert event.startswith(b":") or event == DONE or payload == event[6:-2]
        if payload is not None and event != DONE and not path.name.startswith(("messages", "responses")):
            json.loads(payload)


def test_an_event_comes_out_with_its_last_byte() -> None:
    # A CR ends a line by itself; an LF behind it is no line of its own.
    for before, last, after in ((b"\n", b"\n", b""), (b"\r\n", b"\r", b"\n"), (b"\r", b"\r", b"")):
        splitter = EventSplitter()
        assert splitter.feed(b"data: a" + before) == []
        assert splitter.feed(last) == [b"data: a\n\n"]
        assert splitter.feed(after) == []
        assert splitter.feed(b"data: b" + before + last) == [b"data: b\n\n"]


def test_what_never_became_an_event_is_given_back_once() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\n\ndata: b\n") == [b"data: a\n\n"]
    assert splitter.pending_bytes == len(b"data: b\n")
    assert splitter.flush() == b"data: b\n"
    assert splitter.flush() == b""
    assert splitter.pending_bytes == 0


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  {}\n\n", b" {}"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"event: x\ndata: a\nid: 7\n\n", b"a"),
        (b"data: a\nevent: x\n\n", b"a"),
        (b"data: \n\n", b""),
        (b": comment\n\n", None),
        (b": comment\ndata: a\n\n", b"a"),
        (b"event: x\n\n", None),
        (b"database: a\n\n", None),
        (DONE, b"[DONE]"),
    ],
)
def test_the_payload_of_an_event_is_its_data_lines(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data
