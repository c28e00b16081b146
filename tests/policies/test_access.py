"""Who is let in, and to what?"""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.access import Caller, Keyring

ALICE = Caller(key="alice")
BOB = Caller(key="bob", names=frozenset({"auto", "small"}), admin=True)


def ring(**keys: Caller) -> Keyring:
    return Keyring.of((sha256(key.encode()).hexdigest(), caller) for key, caller in keys.items())


def test_a_key_finds_its_caller() -> None:
    both = ring(one=ALICE, two=BOB)
    assert both.find(b"one") is ALICE
    assert both.find(b"two") is BOB


@pytest.mark.parametrize("key", [b"", b"One", b"one ", b"on", b"onee", b"\x00one", b"\xff", b"x" * 100_000])
def test_what_is_not_exactly_the_key_finds_nobody(key: bytes) -> None:
    assert ring(one=ALICE).find(key) is None


def test_an_empty_ring_finds_nobody() -> None:
    assert ring().find(b"one") is None


def test_digests_may_be_written_in_capitals() -> None:
    assert Keyring.of([(sha256(b"one").hexdigest().upper(), ALICE)]).find(b"one") is ALICE


def test_half_a_digest_is_not_enough() -> None:
    digest = sha256(b"one").digest()
    forged = Keyring({digest[:16]: (digest[:16] + bytes(16), ALICE)})
    assert forged.find(b"one") is None


def test_the_digest_of_a_key_is_not_the_key() -> None:
    assert ring(one=ALICE).find(sha256(b"one").hexdigest().encode()) is None
    assert ring(one=ALICE).find(sha256(b"one").digest()) is None


@given(st.dictionaries(st.binary(max_size=40), st.integers(), max_size=8), st.binary(max_size=40))
def test_only_keys_of_the_ring_find_anybody(keys: dict[bytes, int], asked: bytes) -> None:
    callers = {key: Caller(key=str(number)) for key, number in keys.items()}
    found = Keyring.of((sha256(key).hexdigest(), caller) for key, caller in callers.items()).find(asked)
    assert found is callers.get(asked)


@pytest.mark.parametrize(
    ("names", "allowed"),
    [(("auto",), True), (("large",), False), (("gpt-4o", "auto"), True), ((), False), (("Auto",), False)],
)
def test_a_restricted_caller_may_ask_for_its_names_and_their_aliases(names: tuple[str, ...], allowed: bool) -> None:
    assert BOB.may_ask(*names) is allowed


def test_a_caller_without_a_list_may_ask_for_everything() -> None:
    assert ALICE.may_ask("large")
    assert ALICE.may_ask("anything", "else")


def test_a_caller_with_an_empty_list_may_ask_for_nothing() -> None:
    assert not Caller(key="nobody", names=frozenset()).may_ask("auto")


def test_who_is_not_said_to_be_an_admin_is_none() -> None:
    assert not ALICE.admin
    assert BOB.admin


def test_a_key_holds_until_it_expires_and_not_at_that_moment() -> None:
    caller = Caller(key="guest", expires_s=1000.0)
    assert caller.barred(999.999) is None
    assert caller.barred(1000.0) == "expired"
    assert caller.barred(2000.0) == "expired"


def test_a_replaced_key_holds_for_its_grace() -> None:
    caller = Caller(key="guest", replaced_s=1000.0, expires_s=3000.0)
    assert caller.barred(999.0) is None
    assert caller.barred(1000.0) == "replaced"


def test_a_disabled_key_is_refused_whatever_its_times_say() -> None:
    assert Caller(key="guest", disabled=True, expires_s=1000.0).barred(0.0) == "disabled"


def test_a_key_without_an_end_holds_for_ever() -> None:
    assert ALICE.barred(1e12) is None


def test_a_caller_can_be_counted_by() -> None:
    told = {"team": "red", "user": "u-1", "tags": ("a", "b"), "metadata": (("cost-centre", "17"),)}
    assert len({Caller(key="one", **told), Caller(key="one", **told), Caller(key="two", **told)}) == 2  # type: ignore[arg-type]


def test_who_a_digest_belongs_to_is_told_also_when_the_key_no_longer_holds() -> None:
    gone = Caller(key="gone", disabled=True)
    assert ring(one=gone).find(b"one") is gone
    assert ring(one=gone).holder(sha256(b"one").digest()) is gone
    assert ring(one=gone).holder(sha256(b"two").digest()) is None
