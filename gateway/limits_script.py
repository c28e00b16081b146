"""How is Redis asked to do what `policies.books.Books` does? The script, and what goes in and comes out of it.

    EVALSHA <sha1 of script()> 1 <key(prefix, partition)> *encode(epoch, commands)   ->   decode(what came back)

The script does all commands of one call at the same moment, or, where it fails, none. It knows three more than
`Books`: `Open`, which every connection begins with, `Beat` and `Lose`. Every other command must come with the epoch
that `Opened` told; under another one it is answered with `Stale` and does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files

import msgspec

from policies.operations import Done, Granted, Operation, Refused, Stale

_REDIS_CLOCK = "(function(t) return t[1] * 1000 + (t[2] - t[2] % 1000) / 1000 end)(redis.call('TIME'))"


class Open(msgspec.Struct, frozen=True, array_like=True, tag="open"):
    """Begin to use the store; also a `Beat`.

    `run_id` is that of the server. `known_epoch` is the last epoch the caller was told of and `acked_beat_ms` the
    `now_ms` of the last `Opened` or `Alive` of it; "" and 0: it remembers nothing. With a `ledger` that tells what was
    spent a store without data is not taken for that of a new deployment.
    """

    run_id: str
    known_epoch: str = ""
    acked_beat_ms: int = 0
    ledger: bool = False


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """Say that `replica` is there for another `ttl_ms`, or (`leaving`) that it is not."""

    replica: str
    ttl_ms: int
    leaving: bool = False


class Lose(msgspec.Struct, frozen=True, array_like=True, tag="lose"):
    """Say that windows do not hold what they should. Another epoch begins, and a `Seed` is waited for: `Stale`."""


class Opened(msgspec.Struct, frozen=True, array_like=True, tag="opened"):
    """The epoch to come with. `lost`: what the caller has written before is not, or not all, in it.

    `seeded`: windows hold what they should; otherwise a `Seed` is waited for. Its totals have every bill made before
    `cut_ms`, which may be told in no other way.
    """

    now_ms: int
    epoch: str
    seeded: bool
    lost: bool
    cut_ms: int = 0


class Alive(msgspec.Struct, frozen=True, array_like=True, tag="alive"):
    """Who is there, sorted."""

    now_ms: int
    epoch: str
    seeded: bool
    replicas: tuple[str, ...]


Command = Operation | Open | Beat | Lose
Answer = Granted | Refused | Done | Stale | Opened | Alive

_DECODER: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def script(clock: str = _REDIS_CLOCK) -> str:
    """Return the script. `clock` is the Lua expression for the time, in whole milliseconds since the epoch."""
    text = files("gateway").joinpath("limits.lua").read_text(encoding="utf-8")
    before, found, after = text.partition(_REDIS_CLOCK)
    if not found:
        raise ValueError("gateway/limits.lua does not read the clock as it should.")
    return before + clock + after


def key(prefix: str, partition: str) -> str:
    """Return the one key of a call: all that the script touches begins with it and shares its slot of a cluster."""
    return f"{prefix}:{{{partition}}}"


def encode(epoch: str, commands: Iterable[Command]) -> list[bytes]:
    """Return the arguments of a call."""
    pack = msgspec.msgpack.Encoder().encode
    return [pack((epoch,)), *map(pack, commands)]


def decode(replies: Sequence[bytes]) -> list[Answer]:
    """Return the answers of a call, one a command. Raises `msgspec.DecodeError` where they are none."""
    return [_DECODER.decode(reply) for reply in replies]
