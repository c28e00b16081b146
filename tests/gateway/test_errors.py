"""Can every error be told to a client, and does the documentation tell of every one?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import TABLE, ErrorKind, Refusal, reference

ROOT = Path(__file__).parents[2]
RETRIED = {408, 409, 429}
every_kind = pytest.mark.parametrize("kind", TABLE, ids=[kind.code for kind in TABLE])


def headers(refusal: Refusal) -> dict[bytes, bytes]:
    found = refusal.headers()
    assert len(dict(found)) == len(found)
    return dict(found)


def test_the_page_of_errors_is_fresh() -> None:
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_the_page_has_a_row_for_every_error() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [kind.code for kind in TABLE]
    for row, kind in zip(rows, TABLE, strict=True):
        assert row.count("|") == 6
        assert f" {kind.status} " in row
        assert kind.meaning in row


def test_every_code_is_unique_and_fit_for_a_label() -> None:
    codes = [kind.code for kind in TABLE]
    assert len(set(codes)) == len(codes)
    for code in codes:
        assert code.replace("_", "").isalpha()
        assert code.islower()


@every_kind
def test_an_error_is_openais_json(kind: ErrorKind) -> None:
    refusal = Refusal(kind.code, 'What\nhappened: "é" 🙂', param="messages[0]")
    assert json.loads(refusal.body()) == {
        "error": {
            "message": 'What\nhappened: "é" 🙂',
            "type": kind.type,
            "param": "messages[0]",
            "code": kind.code,
        }
    }
    assert (refusal.status, refusal.code, str(refusal)) == (kind.status, kind.code, refusal.message)
    assert json.loads(Refusal(kind.code, "").body())["error"]["param"] is None


@every_kind
def test_no_sdk_repeats_what_is_final(kind: ErrorKind) -> None:
    found = headers(Refusal(kind.code, ""))
    # No SDK repeats a 402, and a budget is worth saying it twice.
    if kind.status >= 500 or kind.status in (*RETRIED, 402):
        assert (b"x-should-retry" in found) != (b"retry-after" in found)
        assert found.get(b"x-should-retry", b"false") == b"false"
    else:
        assert b"x-should-retry" not in found
        assert b"retry-after" not in found
    assert (b"retry-after" in found) == (kind.retry == "later")


@every_kind
def test_only_a_401_asks_for_credentials(kind: ErrorKind) -> None:
    found = headers(Refusal(kind.code, ""))
    assert (b"www-authenticate" in found) == (kind.status == 401)
    if kind.status == 401:
        assert found[b"www-authenticate"].startswith(b"Bearer ")


@pytest.mark.parametrize(("advice", "said"), [(None, b"1"), (0, b"1"), (1, b"1"), (7, b"7"), (86_400, b"86400")])
def test_who_shall_come_back_later_is_told_when(advice: int | None, said: bytes) -> None:
    assert headers(Refusal("upstream_overloaded", "", retry_after_s=advice))[b"retry-after"] == said


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 429])
@pytest.mark.parametrize("code", [None, "bad_grammar"])
def test_a_backends_own_refusal_keeps_its_status_and_code(status: int, code: str | None) -> None:
    refusal = Refusal("upstream_rejected", "No.", status=status, shown_code=code, keep_code=False)
    assert refusal.status == status
    assert json.loads(refusal.body())["error"]["code"] == code
    assert refusal.code == "upstream_rejected"
    assert (headers(refusal).get(b"x-should-retry") == b"false") == (status in RETRIED)


def test_a_code_that_is_not_in_the_table_is_a_fault_of_ours() -> None:
    with pytest.raises(KeyError):
        Refusal("no_such_code", "")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.one_of(st.none(), st.text(max_size=5)))
def test_any_message_can_be_told(message: str, param: str | None) -> None:
    try:
        (param or "").encode()
    except UnicodeEncodeError:
        return
    assert json.loads(Refusal("invalid_value", message, param=param).body())["error"]["message"] == message
