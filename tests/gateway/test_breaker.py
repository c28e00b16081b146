"""Is a store that failed left in peace for a while, and not for ever?"""

from __future__ import annotations

from gateway.breaker import Breaker


def test_one_fault_opens_it_and_says_so_once() -> None:
    breaker = Breaker()
    assert breaker.closed
    assert breaker.failed()
    assert not breaker.closed
    assert not breaker.failed()


def test_pauses_grow_up_to_half_a_second_and_begin_anew() -> None:
    breaker = Breaker()
    breaker.failed()
    pauses = [breaker.pause_s() for _ in range(10)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.1, 0.5)
    breaker.worked()
    assert breaker.closed
    assert breaker.failed()
    assert breaker.pause_s() == 0.1
