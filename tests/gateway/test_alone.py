"""How large is the share of a replica that cannot ask the store? By whom it saw last, and by what it knows anyway."""

from __future__ import annotations

import pytest

from gateway.alone import Alone
from gateway.limiter import Item, Order
from policies.accounts import Concurrency, Entry
from policies.operations import Granted


@pytest.mark.parametrize(
    ("seen", "expected", "least", "passed"),
    [
        ((), 1, 1, 12),
        ((), 3, 1, 4),
        (("a", "b"), 9, 1, 6),
        (("b", "c", "d"), 1, 1, 3),  # it has not seen itself: there is one more
        (("a",), 1, 4, 3),  # the other workers of its gateway will be seen in a moment
        ((), 1, 4, 3),
        (("a", "b", "c"), 1, 2, 4),
    ],
)
def test_a_share(seen: tuple[str, ...], expected: int, least: int, passed: int) -> None:
    alone = Alone("a", expected_replicas=expected, least_replicas=least, now_ms=lambda: 1_000_000)
    alone.replicas = seen
    items = (Item(Entry("all", Concurrency(12), held=1), "share"),)
    granted = [alone.verdict(str(n), Order(str(n), "deployment", items)) for n in range(20)]
    assert sum(isinstance(one, Granted) for one in granted) == passed
