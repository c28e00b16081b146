"""Is the list whole, whatever stands where in it? The operations on keys without HTTP; the rest is in `test_admin.py`."""

from __future__ import annotations

import asyncio

import pytest

from gateway.config import model as noun
from gateway.errors import Refusal
from gateway.key_admin import KeyAdmin
from gateway.key_bodies import KeyChange
from gateway.key_store import MemoryKeys, StoredKey
from tests.gateway.key_stores import stored

HIDING = noun.Key(name="zoe", sha256="a" * 64, team="red")


async def shelf_with(*names: str) -> MemoryKeys:
    shelf = MemoryKeys()
    for name in names:
        assert await shelf.replace(name, None, stored(name, team="blue"))
    return shelf


def test_a_stored_key_that_the_configuration_hides_is_not_listed_and_can_be_deleted() -> None:
    async def test() -> None:
        shelf = await shelf_with("zoe", "amy")
        keys = KeyAdmin(shelf, configured=[HIDING])
        page = await keys.page(after="", limit=10)
        assert [(one.name, one.source) for one in page.data] == [("amy", "store"), ("zoe", "config")]
        assert not page.has_more
        assert (await keys.show("zoe")).team == "red"
        with pytest.raises(Refusal, match="configuration"):
            await keys.change("zoe", KeyChange(disabled=True))
        await keys.delete("zoe")
        assert await shelf.named("zoe") is None
        with pytest.raises(Refusal, match="configuration"):
            await keys.delete("zoe")

    asyncio.run(test())


def test_no_call_reads_the_whole_store_and_yet_all_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.key_admin._MOST_READ", 100)

    async def test() -> None:
        keys = KeyAdmin(await shelf_with(*(f"k{number:03}" for number in range(350))), configured=[HIDING])
        calls, found, after = 0, [], ""
        while True:
            calls += 1
            page = await keys.page(after=after, limit=10, team="red")
            found += [one.name for one in page.data]
            if page.next is None:
                break
            after = page.next
        assert found == ["zoe"]
        assert calls > 3

    asyncio.run(test())


def test_a_key_that_others_change_all_the_time_is_left_alone() -> None:
    class Busy(MemoryKeys):
        async def replace(self, name: str, before: StoredKey | None, after: StoredKey | None) -> bool:
            return before is None and await super().replace(name, before, after)

    async def test() -> None:
        shelf = Busy()
        await shelf.replace("amy", None, amy := stored("amy"))
        with pytest.raises(Refusal) as caught:
            await KeyAdmin(shelf).change("amy", KeyChange(priority=3))
        assert caught.value.code == "keys_unavailable"
        assert await shelf.named("amy") == amy

    asyncio.run(test())
