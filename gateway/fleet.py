"""Which backends are there, and which of them answer? The live state of every server.

What a call finds out counts at once: a server that cannot be reached is passed over from the next request on, until a
probe reaches it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from time import time
from typing import Literal

import msgspec

from backends.backend import Backend, BackendFault, ServerFacts, Unreachable

_PROBE_EVERY_S = 1.0
_log = logging.getLogger("tierway.fleet")


Scores = Literal["always", "not_with_streamed_tools", "never"]
"""When a server takes a request for log-probabilities."""


class Member(msgspec.Struct, kw_only=True):
    """One backend and what is known of it. `since` is the time of the last change, in seconds since the epoch.

    `takes_priority`: it schedules by the priority of a call. `facts` are what it says of itself.
    """

    name: str
    kind: str
    model: str
    tier: str
    backend: Backend
    scores: Scores = "always"
    takes_priority: bool = False
    facts: ServerFacts = ServerFacts()
    up: bool | None = None
    since: float = 0.0
    last_fault: str | None = None

    @property
    def context_tokens(self) -> int | None:
        """The context window that it says its model has."""
        return self.facts.context_tokens(self.model)


class Fleet:
    """All backends by name."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self.members = members
        self.down: frozenset[str] = frozenset()

    def report(self, name: str, fault: BackendFault | None) -> None:
        """Note what a call to a backend showed. Only being unreachable says that the next call will fail too."""
        if isinstance(fault, Unreachable):
            self._set(name, up=False, fault=str(fault))
        elif fault is None:
            self._set(name, up=True, fault=None)

    def _set(self, name: str, *, up: bool, fault: str | None) -> None:
        member = self.members[name]
        member.last_fault = fault or member.last_fault
        if member.up == up:
            return
        if not up:
            _log.warning("backend %s is down: %s", name, fault)
        elif member.up is not None:
            _log.warning("backend %s is up again", name)
        member.up, member.since = up, time()
        self.down = frozenset(one.name for one in self.members.values() if one.up is False)

    async def probe_all(self) -> None:
        """Probe every backend once."""
        await asyncio.gather(*(self._probe(member) for member in self.members.values()))

    async def keep_probing(self) -> None:
        """Probe every backend for ever, each at its own pace: one that hangs delays no other."""
        await asyncio.gather(*(self._probe_for_ever(member) for member in self.members.values()))

    async def _probe_for_ever(self, member: Member) -> None:
        while True:
            await self._probe(member)
            await asyncio.sleep(_PROBE_EVERY_S)

    async def _probe(self, member: Member) -> None:
        try:
            member.facts = await member.backend.probe()
        except BackendFault as fault:
            self._set(member.name, up=False, fault=str(fault))
        else:
            self._set(member.name, up=True, fault=None)

    @property
    def ready(self) -> bool:
        """Whether anything can be answered."""
        return any(member.up for member in self.members.values())
