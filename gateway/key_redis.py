"""How are keys kept in Redis? In one slot, every operation a script, so that each happens as a whole.

Below the one key that names them all: `records`: name -> revision, space, JSON. `digests`: digest -> name. `names`: a
sorted set, for listing. `changes`: a stream, whose ids ascend whatever clock a replica has. A reader that does not find
the last entry it saw where it was knows that it was trimmed, or that Redis has lost or replaced its data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from gateway.key_store import LONGEST_PAGE, MOST_TOLD, Changes, KeysDown, StoredKey
from gateway.redis_store import RedisStore, Script, StoreDown, StoreMisused

_log = logging.getLogger("tierway.keys")
_KEPT_CHANGES = 10_000
_PATIENT_S = 2.0
"""For what an operator waits for, and no request."""

# A record that is not there is an empty string: the store's answers are arrays of strings.
_FIND = Script.of("""\
local names = redis.call('HMGET', KEYS[1] .. ':digests', unpack(ARGV))
local found = {}
for i, name in ipairs(names) do
  found[i] = name and redis.call('HGET', KEYS[1] .. ':records', name) or ''
end
return found
""")

_CHANGES = Script.of("""\
local changes, since, most = KEYS[1] .. ':changes', ARGV[1], tonumber(ARGV[2])
local last = redis.call('XREVRANGE', changes, '+', '-', 'COUNT', 1)[1]
local told = {last and last[1] or '', 'known'}
if told[1] == since then return told end
local found = since ~= '' and redis.call('XRANGE', changes, since, '+', 'COUNT', most + 2) or {}
if not found[1] or found[1][1] ~= since or #found > most + 1 then return {told[1], 'lost'} end
for i = 2, #found do told[i + 1] = found[i][2][2] end
return told
""")

_NAMED = Script.of("""\
return {redis.call('HGET', KEYS[1] .. ':records', ARGV[1]) or ''}
""")

_PAGE = Script.of("""\
local names = redis.call('ZRANGEBYLEX', KEYS[1] .. ':names', ARGV[1], '+', 'LIMIT', 0, ARGV[2])
return #names == 0 and {} or redis.call('HMGET', KEYS[1] .. ':records', unpack(names))
""")

# ARGV: name, revision that must stand there, record to put there, how many changes to keep, how many digests go; then
# the digests that go and those that come.
_REPLACE = Script.of("""\
local records, digests, names = KEYS[1] .. ':records', KEYS[1] .. ':digests', KEYS[1] .. ':names'
local name, before, after, gone = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5])
local standing = redis.call('HGET', records, name)
if (standing and string.match(standing, '^[^ ]*') or '') ~= before then return {'no'} end
for i = 6, 5 + gone do redis.call('HDEL', digests, ARGV[i]) end
for i = 6 + gone, #ARGV do redis.call('HSET', digests, ARGV[i], name) end
if after == '' then
  redis.call('HDEL', records, name)
  redis.call('ZREM', names, name)
else
  redis.call('HSET', records, name, after)
  redis.call('ZADD', names, 0, name)
end
redis.call('XADD', KEYS[1] .. ':changes', 'MAXLEN', '~', ARGV[4], '*', 'name', name)
return {'done'}
""")


class RedisKeys:
    """Keys of a deployment, below `prefix`: a `KeySource` and a `KeyShelf`."""

    def __init__(self, redis: RedisStore, *, prefix: str) -> None:
        self._redis = redis
        self._key = f"{prefix}:{{keys}}"

    async def find(self, digests: Sequence[bytes]) -> Sequence[StoredKey | None]:
        return list(map(_record, await self._run(_FIND, *(digest.hex() for digest in digests))))

    async def changes(self, since: str) -> Changes:
        at, known, *names = await self._run(_CHANGES, since, MOST_TOLD)
        return Changes(at.decode(), tuple(name.decode() for name in names) if known == b"known" else None)

    async def named(self, name: str) -> StoredKey | None:
        return _record((await self._run(_NAMED, name, within_s=_PATIENT_S))[0])

    async def page(self, after: str, limit: int) -> Sequence[StoredKey]:
        start = f"({after}" if after else "-"
        found = await self._run(_PAGE, start, min(limit, LONGEST_PAGE), within_s=_PATIENT_S)
        return [record for record in map(_record, found) if record is not None]

    async def replace(self, name: str, before: StoredKey | None, after: StoredKey | None) -> bool:
        old, new = (set(one.digests) if one else set() for one in (before, after))
        done = await self._run(
            _REPLACE,
            name,
            before.revision if before else "",
            after.revision.encode() + b" " + msgspec.json.encode(after) if after else b"",
            _KEPT_CHANGES,
            len(old - new),
            *sorted(old - new),
            *sorted(new - old),
            within_s=_PATIENT_S,
        )
        return done == [b"done"]

    async def _run(self, script: Script, *arguments: str | bytes | int, within_s: float | None = None) -> list[bytes]:
        encoded = [one if isinstance(one, bytes) else str(one).encode() for one in arguments]
        try:
            return await self._redis.run(script, self._key, encoded, within_s=within_s)
        except (StoreDown, StoreMisused) as fault:
            raise KeysDown(str(fault)) from None


_decode = msgspec.json.Decoder(StoredKey).decode


def _record(value: bytes) -> StoredKey | None:
    """Read a record. One that cannot be read is none, and the operator is told: the others go on."""
    if not value:
        return None
    revision, _, content = value.partition(b" ")
    try:
        return _decode(content)
    except msgspec.MsgspecError:
        _log.error("the record of a stored key (revision %.16r) cannot be read", revision.decode("ascii", "replace"))
        return None
