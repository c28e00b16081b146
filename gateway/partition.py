"""How are the accounts of one partition shared with other replicas? Operations in batches, and what holds without.

    joining ──▶ shared ──▶ down ──▶ reconciling ──▶ joining ──▶ shared

`joining`: the store is being asked what it knows and told what it does not; reservations wait, within the time of the
store. `shared`: the store decides. `down`: this process decides, by what each item says (`when_down`). `reconciling`:
the same, while the store is being told what happened meanwhile. Rules a reader must not break:

* A reservation is answered within the time of the store, whatever happens.
* Nothing is asked of a store under an epoch that was not opened on the very server that answers.
* What was sent and not answered may have been done: it is cancelled, announced or settled by its id, never assumed.
* Shared counting resumes when the store knows all that this process knows, not before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from gateway.alone import Alone
from gateway.batches import MOST_IN_BATCH, Batches, Pending
from gateway.limiter import Clock, Closed, Item, Numbers, Order, SoFar, Told, Unseeded, bill_of, entries_of
from gateway.limits_script import Alive, Answer, Beat, Lose, key
from gateway.reconcile import NEVER, UNSURE, Backlog, Held, Said
from gateway.redis_store import RedisStore, Script, ServerChanged, StoreDown, StoreMisused
from gateway.store_session import Session
from policies.accounts import Concurrency, Entry, Standing, is_window
from policies.operations import Cancel, Done, Granted, Look, Refused, Renew, Reserve, Seed, Settle

_MOST_BURNT = 10_000
_JOIN_ATTEMPTS = 3
_KEPT_BACK = 0.05
_PATIENT_S = 0.5
"""How long joining may wait for an answer. Nobody waits for it: a new connection may take longer than a question."""

Mode = Literal["joining", "shared", "reconciling", "down"]

_log = logging.getLogger("tierway.limits")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`replica` is this process, and no other that there ever was. `expected_replicas` where none was ever seen.

    `least_replicas` is how many there are at least, whoever was seen: the workers of one gateway know of each other.
    With a `ledger` a store that knows nothing is told what was spent (`gateway/reseeding.py`) before it counts.
    """

    replica: str
    prefix: str = "tierway"
    partition: str = "deployment"
    lease_s: float = 30.0
    expected_replicas: int = 1
    least_replicas: int = 1
    beat_every_s: float = 1.0
    alive_for_s: float = 5.0
    ledger: bool = False


class Partition:
    """One partition of the store. `fault` is told of every fault of the store, `freed` of what was given back."""

    def __init__(
        self,
        name: str,
        store: RedisStore,
        script: Script,
        settings: Settings,
        *,
        numbers: Numbers,
        clock: Clock,
        fault: Callable[[str, str], None],
        freed: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.name = name
        self._session = Session(store, script, key(settings.prefix, name), ledger=settings.ledger)
        self.place = self._session.place
        self.mode: Mode = "down"
        self.seeded = True
        self.touched = True
        self.used_s = self._loop.time()
        self._settings = settings
        self._patience_s = max(_PATIENT_S, store.timeout_s)
        self._lease_ms = round(settings.lease_s * 1000)
        self._numbers = numbers
        self._clock = clock
        self._fault = fault
        self._freed = freed
        # What is known of the store, and what is on its way to it.
        self._next_beat_s = 0.0
        self._young_until_s = 0.0
        self._ahead_ms = 0
        self._cut_ms = 0
        self._batches = Batches(
            self._session,
            beat=self._beat,
            answered=self._answered,
            not_done=self._not_done,
            not_answered=self._not_answered,
            numbers=numbers,
        )
        self._held_up: asyncio.TimerHandle | None = None
        self._joining: asyncio.Task[bool] | None = None
        # What is held here.
        self._held: dict[str, Held] = {}
        self._burnt: dict[str, int] = {}
        self._backlog = Backlog(f"{settings.replica}/{name}", numbers)
        self._alone = Alone(
            settings.replica,
            expected_replicas=settings.expected_replicas,
            least_replicas=settings.least_replicas,
            now_ms=self._now_ms,
        )

    @property
    def idle(self) -> bool:
        """Whether nothing would be lost with it."""
        return not (self._held or self._batches.busy or self._batches.waiting or self._backlog or self._joining)

    @property
    def unseeded(self) -> Unseeded | None:
        """What it waits for, where the store has lost what was spent."""
        if self.seeded or self.mode != "shared":
            return None
        return Unseeded(self.name, self._session.epoch, self._cut_ms)

    def _now_ms(self) -> int:
        """Return the time by the clock of the store, as far as that is known."""
        return self._clock.now_ms() + self._ahead_ms

    # -- what is asked of it ------------------------------------------------------------------------------------------

    async def reserve(self, order: Order, so_far: SoFar) -> Granted | Refused | Closed:
        """Answer within the time of the store."""
        if self.mode == "shared":
            if not self.seeded and (verdict := self._doubted(order)) is not None:
                return verdict
        elif self.mode != "joining":
            return self._decide(order, so_far, sent=False)
        pending = Pending(self._reservation(order), order, so_far, self._loop.create_future())
        return await self._ask(pending)  # type: ignore[return-value]

    def settle(self, order: Order, actual: tuple[int, ...], at_ms: int = 0) -> None:
        """Give back and count, in windows when the bill was made."""
        held = self._held.pop(order.id, None)
        if held is None:
            return
        self._alone.settle(held.id, actual)
        if self.mode == "shared":
            if self.seeded:
                self._alone.note_used(order.items, actual)
            entries = () if held.epoch == self._session.epoch else entries_of(order.items)
            settle = Settle(held.id, actual, entries, at_ms or self._now_ms(), bill_of(order))
            self._batches.put(Pending(settle, order), at_once=_awaited(order))
            return
        self._backlog.settle(held, actual, self._now_ms(), at_ms)
        self._freed()

    def cancel(self, order: Order) -> None:
        """Undo."""
        held = self._held.pop(order.id, None)
        if held is None:
            return
        self._alone.cancel(held.id)
        if self.mode == "shared":
            self._batches.put(Pending(Cancel(held.id), order), at_once=_awaited(order))
            return
        if held.epoch == NEVER:
            self._backlog.forget(held.id)
        else:
            self._backlog.cancel(held.id)
        self._freed()

    async def look(self, items: tuple[Item, ...]) -> tuple[Standing, ...]:
        """Tell how accounts stand."""
        if self.mode in ("shared", "joining"):
            reply = await self._ask(Pending(Look(entries_of(items)), answer=self._loop.create_future()))
            if isinstance(reply, Done):
                self._note(items, reply)
                return reply.standings
        return self._own().look(items)

    async def seed(self, entries: tuple[Entry, ...]) -> bool:
        """Tell totals to a store that has lost its own."""
        if self.mode not in ("shared", "joining"):
            return False
        reply = await self._ask(Pending(Seed(entries), answer=self._loop.create_future()))
        if not isinstance(reply, Done):
            return False
        self._now_seeded()
        return reply.known

    async def tell(self, operations: Sequence[Told | Seed], *, epoch: str) -> int | None:
        """Tell what was spent elsewhere, under one epoch (`""`: any); how many counted. None: not all was told."""
        counted = 0
        for first in range(0, len(operations), MOST_IN_BATCH):
            if self.mode != "shared" or epoch not in ("", self._session.epoch):
                return None
            batch = operations[first : first + MOST_IN_BATCH]
            try:
                answers = await self._session.run(batch, within_s=self._patience_s)
            except ServerChanged:
                self._not_done([])
                return None
            except (StoreDown, StoreMisused) as fault:
                self._not_answered([], str(fault))
                return None
            counted += sum(isinstance(answer, Done) and answer.known for answer in answers)
        return counted

    async def lose(self) -> bool:
        """Have the store begin anew, as if it had lost what was spent, for all replicas; whether it heard that."""
        if self.mode != "shared":
            return False
        try:
            await self._session.run([Lose()], within_s=self._patience_s)
        except ServerChanged:
            self._not_done([])
            return self._joining is not None and await self._joining
        except (StoreDown, StoreMisused) as fault:
            self._not_answered([], str(fault))
        return False

    async def end_seeding(self, epoch: str) -> bool:
        """Say that all has been told; whether the store heard it. Budgets are counted together again from here on."""
        if await self.tell([Seed(())], epoch=epoch) is None:
            return False
        self._now_seeded()
        return True

    def tend(self, now_s: float, *, beat: bool) -> None:
        """Renew what is held long, and say that this process lives."""
        if self.mode != "shared":
            return
        renew_before_s = now_s - self._settings.lease_s / 3
        for held in self._held.values():
            if held.told_s <= renew_before_s:
                held.told_s = now_s
                self._batches.put(Pending(Renew(held.id, held.so_far(), self._lease_ms)), at_once=False)
        if beat and now_s >= self._next_beat_s:
            # It goes with every batch once it is due; here there was none.
            self._batches.flush_soon()

    async def leave(self, within_s: float) -> None:
        """Send what is still to be sent, and say that this process ends."""
        if self._joining is not None:
            await asyncio.wait([self._joining], timeout=within_s)
        if self.mode == "shared":
            self._batches.put(Pending(Beat(self._settings.replica, 0, leaving=True)), at_once=True)
            await self._batches.drain(within_s)
        self.stop()

    def stop(self) -> None:
        """End every task of this partition."""
        self._batches.abandon()
        self._stop_timer()
        if self._joining is not None:
            self._joining.cancel()

    # -- answers ------------------------------------------------------------------------------------------------------

    async def _ask(self, pending: Pending) -> Granted | Refused | Closed | Done:
        answer = pending.answer
        if answer is None:
            raise TypeError("nobody waits for the answer")
        if self._batches.busy or self.mode == "joining":
            # What waits behind others waits no longer for that.
            pending.due_s = self._due_s()
        if self.mode == "joining":
            self._wait_until(pending.due_s)
        self._batches.put(pending, at_once=True)
        try:
            return await answer
        except asyncio.CancelledError:
            pending.left = True
            if answer.done() and not answer.cancelled() and pending.order is not None:
                self.cancel(pending.order)
            raise

    def _beat(self) -> Beat | None:
        """Return the sign of life that is due."""
        now_s = self._loop.time()
        if now_s < self._next_beat_s:
            return None
        every_s = self._settings.beat_every_s
        # Replicas that start together see each other soon: until then each would take the share of all.
        self._next_beat_s = now_s + (every_s / 4 if now_s < self._young_until_s else every_s)
        return Beat(self._settings.replica, round(self._settings.alive_for_s * 1000))

    def _answered(self, batch: list[Pending], answers: Sequence[Answer]) -> None:
        self._ahead_ms = answers[0].now_ms - self._clock.now_ms()
        freed = False
        for pending, answer in zip(batch, answers, strict=True):
            operation = pending.operation
            if isinstance(operation, Reserve):
                self._reserved(pending, answer)
            elif isinstance(operation, Settle | Cancel):
                freed = True
            elif isinstance(answer, Alive):
                self._alive(answer)
            elif pending.answer is not None and not pending.answer.done() and isinstance(answer, Done):
                pending.answer.set_result(answer)
        if freed:
            self._freed()

    def _reserved(self, pending: Pending, answer: Answer) -> None:
        order, so_far, waiting = pending.order, pending.so_far, pending.answer
        operation = pending.operation
        if order is None or so_far is None or waiting is None or not isinstance(operation, Reserve):
            raise TypeError("a reservation that nobody waits for")
        if not isinstance(answer, Granted | Refused):
            raise TypeError(f"a reservation was answered with {type(answer).__name__}")
        if isinstance(answer, Granted):
            held = Held(operation.id, order, so_far, self._session.epoch, self._loop.time())
            self._held[order.id] = held
            if self.mode != "shared":
                self._backlog.announce([held])
        elif self._alone.cancel(operation.id):
            # The books here remember what was cancelled; who waits for a turn asks again under the same id.
            self._burn(order.id)
        self._note(order.items, answer)
        if pending.left or waiting.done():
            self.cancel(order)
            return
        waiting.set_result(_without_doubts(answer, operation.entries, order) if not self.seeded else answer)

    def _note(self, items: tuple[Item, ...], answer: Granted | Refused | Done) -> None:
        # What a store that lost its data says is less than what was seen before.
        if self.seeded:
            self._alone.note(items, answer.standings, answer.now_ms)

    def _alive(self, answer: Alive) -> None:
        self._session.heard(answer.now_ms)
        self._alone.replicas = answer.replicas
        if answer.seeded:
            self._now_seeded()

    def _now_seeded(self) -> None:
        if not self.seeded:
            self.seeded = True
            self._alone.end()
            _log.warning("the budgets of %s are known again", self.name)

    # -- faults -------------------------------------------------------------------------------------------------------

    def _not_done(self, batch: list[Pending]) -> None:
        """Nothing of it was done: another server answers, or the store has lost its data. Find out, then send it."""
        due_s = self._due_s()
        for pending in reversed(batch):
            if pending.answer is not None:
                due_s = pending.due_s = pending.due_s or due_s
                self._batches.put_back(pending)
            else:
                self._keep(pending)
        if self.mode == "shared":
            self._hold()
            self._wait_until(due_s)
            self._backlog.announce(self._held.values())
            self.join()
        elif self.mode != "joining":
            self._answer_queue()

    def _not_answered(self, batch: list[Pending], why: str) -> None:
        """Nobody knows whether it was done."""
        self._fault(self.place, why)
        self.go_down()
        self._give_up(batch, sent=True)

    def go_down(self) -> None:
        """Decide alone from now on, and answer all who wait."""
        if self._joining is not None and self._joining is not asyncio.current_task():
            self._joining.cancel()
        if self.mode == "down":
            return
        self._become("down")
        self._stop_timer()
        self._backlog.announce(self._held.values())
        self._own()
        for batch in self._batches.abandon():
            self._give_up(batch, sent=True)
        self._answer_queue()

    def _answer_queue(self) -> None:
        self._give_up(self._batches.take(), sent=False)

    def _give_up(self, batch: Sequence[Pending], *, sent: bool) -> None:
        """Answer those who wait, and keep what must still be told."""
        for pending in batch:
            waiting, order = pending.answer, pending.order
            if waiting is None or not isinstance(pending.operation, Reserve) or order is None:
                self._keep(pending)
                if waiting is not None and not waiting.done():
                    waiting.set_result(Closed(()))
            elif pending.left or waiting.cancelled() or pending.so_far is None:
                if sent:
                    self._backlog.cancel(pending.operation.id)
            elif not waiting.done():
                waiting.set_result(self._decide(order, pending.so_far, sent=sent, id_=pending.operation.id))

    def _keep(self, pending: Pending) -> None:
        """Keep the end of a reservation that the store may not have heard of."""
        operation, order = pending.operation, pending.order
        if isinstance(operation, Cancel):
            self._backlog.cancel(operation.id)
        elif isinstance(operation, Settle) and order is not None:
            held = Held(operation.id, order, tuple, UNSURE if operation.entries else self._session.epoch, 0.0)
            self._backlog.settle(held, operation.actual, self._now_ms(), operation.at_ms)

    # -- without the store --------------------------------------------------------------------------------------------

    def _decide(self, order: Order, so_far: SoFar, *, sent: bool, id_: str | None = None) -> Granted | Refused | Closed:
        """Decide alone. `sent`: the store was asked too, and may have granted it."""
        id_ = id_ or self._id_of(order)
        verdict = self._own().verdict(id_, order)
        if isinstance(verdict, Granted):
            self._numbers.granted_locally += 1
            held = Held(id_, order, so_far, UNSURE if sent else NEVER, self._loop.time())
            self._held[order.id] = held
            self._backlog.announce([held])
            return verdict
        if isinstance(verdict, Closed):
            self._numbers.closed += 1
        else:
            self._numbers.refused_locally += 1
        if sent:
            self._backlog.cancel(id_)
            self._burn(order.id)
        return verdict

    def _doubted(self, order: Order) -> Refused | Closed | None:
        """Decide alone on what the store has forgotten; None: the store may go on."""
        verdict = self._own().verdict(self._id_of(order), order, sums_only=True)
        if isinstance(verdict, Granted):
            return None
        return verdict

    def _own(self) -> Alone:
        self._alone.begin(self._held.values())
        return self._alone

    def _reservation(self, order: Order) -> Reserve:
        entries = entries_of(order.items)
        if not self.seeded:
            entries = tuple(
                msgspec.structs.replace(entry, shadow=True) if is_window(entry.rule) else entry for entry in entries
            )
        return Reserve(self._id_of(order), entries, self._lease_ms)

    def _id_of(self, order: Order) -> str:
        """Return the id of an order in the store: another one once the first was cancelled there."""
        times = self._burnt.get(order.id, 0) if self._burnt else 0
        return f"{order.id}~{times}" if times else order.id

    def _burn(self, id_: str) -> None:
        self._burnt[id_] = self._burnt.get(id_, 0) + 1
        if len(self._burnt) > _MOST_BURNT:
            del self._burnt[next(iter(self._burnt))]

    # -- coming back --------------------------------------------------------------------------------------------------

    def join(self) -> asyncio.Task[bool]:
        """Ask the store what it knows and tell it what it does not, then share. Whether that has worked."""
        if self._joining is None:
            self._joining = self._loop.create_task(self._join())
            self._joining.add_done_callback(self._joined)
        return self._joining

    def _joined(self, task: asyncio.Task[bool]) -> None:
        self._joining = None
        if task.cancelled() or task.exception() is None:
            return
        _log.error("cannot join the store", exc_info=task.exception())
        self._fault(self.place, str(task.exception()))
        self.go_down()

    def begin(self) -> None:
        """Join for the first time; reservations wait for it."""
        self._hold()
        self.join()

    async def _join(self) -> bool:
        why = "its servers change too fast"
        for _ in range(_JOIN_ATTEMPTS):
            try:
                await self._open()
                await self._reconcile()
            except ServerChanged:
                continue
            except (StoreDown, StoreMisused) as fault:
                why = str(fault)
                break
            else:
                self._resume()
                return True
        self._fault(self.place, why)
        self.go_down()
        return False

    async def _open(self) -> None:
        before = self._session.epoch
        opened = await self._session.open(within_s=self._patience_s)
        if before and opened.epoch != before:
            self._backlog.announce(self._held.values())
        if not opened.seeded and self.seeded and opened.lost:
            _log.warning("the store has lost what was counted in %s: budgets follow their when_down", self.name)
        self.seeded, self._cut_ms = opened.seeded, opened.cut_ms
        self._next_beat_s = 0.0
        self._young_until_s = self._loop.time() + 3 * self._settings.beat_every_s

    async def _reconcile(self) -> None:
        """Tell the store what it does not know. Towards the end reservations wait, so that there is one."""
        if self.mode == "down":
            self._become("reconciling")
        while said := self._backlog.next(
            MOST_IN_BATCH, epoch=self._session.epoch, lease_ms=self._lease_ms, now_ms=self._now_ms()
        ):
            if len(said) < MOST_IN_BATCH:
                self._hold()
            await self._say(said)

    async def _say(self, said: list[Said]) -> None:
        try:
            await self._session.run(said, within_s=self._patience_s)
        except StoreMisused:
            _log.exception("the store does not take what happened while it was down")
            self._backlog.drop(said)
        else:
            self._backlog.done(said, epoch=self._session.epoch, now_s=self._loop.time())

    def _hold(self) -> None:
        self._become("joining")

    def _become(self, mode: Mode) -> None:
        self.mode = mode
        self._batches.flowing = mode == "shared"

    def _due_s(self) -> float:
        # Something is kept back, so that the caller hears of it within the time.
        return self._loop.time() + self._session.timeout_s * (1 - _KEPT_BACK)

    def _wait_until(self, due_s: float) -> None:
        """Let nobody who waits for the join wait longer."""
        if self._held_up is None:
            self._held_up = self._loop.call_at(due_s, self.wait_no_longer)

    def _stop_timer(self) -> None:
        if self._held_up is not None:
            self._held_up.cancel()
            self._held_up = None

    def wait_no_longer(self) -> None:
        """Those who wait cannot wait longer. The store is not down yet; it is only not ready."""
        self._stop_timer()
        if self.mode == "joining":
            self._become("reconciling")
            self._answer_queue()

    def _resume(self) -> None:
        """Let the store decide again, also on those who wait."""
        self._become("shared")
        self.place = self._session.place
        self._stop_timer()
        if self.seeded:
            self._alone.end()
        for pending in self._batches.take():
            if not self.seeded and pending.order is not None and isinstance(pending.operation, Reserve):
                verdict = self._doubted(pending.order)
                if verdict is not None:
                    if pending.answer is not None and not pending.answer.done():
                        pending.answer.set_result(verdict)
                    continue
                pending.operation = self._reservation(pending.order)
            self._batches.put(pending, at_once=True)


def _awaited(order: Order) -> bool:
    """Whether the next request may need what this one gives back: a caller with one at a time asks again at once."""
    return any(isinstance(item.entry.rule, Concurrency) for item in order.items)


def _without_doubts(answer: Granted | Refused, sent: tuple[Entry, ...], order: Order) -> Granted | Refused:
    """Leave out what refused nothing because the store had forgotten what it should refuse by."""
    kept = tuple(one for one in answer.short if sent[one.index].shadow == order.items[one.index].entry.shadow)
    return msgspec.structs.replace(answer, short=kept)
