"""What does one exchange hold of the limits? Its reservation, those of its attempts, and what it has used so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

import msgspec

from gateway.admission import Admission, Request, Reservation, WhileHere
from gateway.body import Body
from gateway.decision import Header
from gateway.driver import Door, Full, Run
from gateway.errors import Refusal
from gateway.pricing import PriceList
from gateway.sizing import Counts, Sizes
from gateway.wire import TokenUsage
from policies.access import Caller
from policies.cost import cost_of
from policies.limits import Account, Amounts, Facts, Need, Use
from routing.ladder import Route
from routing.plan import PlannedAttempt


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks for what."""

    exchange_id: str
    caller: Caller
    facts: Facts
    route: Route
    body: Body
    prices: PriceList


class Allowance:
    """One exchange's share of the limits. `use` tells at any time what it has used."""

    def __init__(self, admission: Admission, sizes: Sizes, asking: Asking, use: Callable[[], Use]) -> None:
        self._admission = admission
        self._sizes = sizes
        self._asking = asking
        self._use = use
        self._need = Need.nothing()
        self._counts: Counts = {}
        self._accounts: tuple[Account, ...] = ()
        self._reservation = Reservation()

    @property
    def waited_s(self) -> float:
        """How long it waited for its turn."""
        return self._reservation.waited_s

    @property
    def strict(self) -> bool:
        """Whether a limit relies on what was reserved not being passed."""
        return any(one.limit.strict for one in self._accounts)

    def prompt_tokens(self, tier: str, model: str) -> int:
        """Return how many tokens the prompt has, for an attempt that is left before its server has said so."""
        count = self._counts.get(tier)
        return self._sizes.prompt_estimate(model, self._asking.body.asked) if count is None else count.tokens

    def headers(self) -> list[Header]:
        """Return what the client is told of its limits."""
        return self._reservation.headers()

    async def ask(self, while_here: WhileHere) -> None:
        """Reserve what the request can come to, in every limit that counts it. Raises `Refusal`."""
        asking, sizes = self._asking, self._sizes
        if not self._admission.limits:
            return
        self._accounts = self._admission.accounts(asking.facts)
        self._need = sizes.need(asking.route, asking.body.asked, asking.prices.tiers, most=self.strict)
        counted = self._worth_counting() or sizes.near_window(asking.route, asking.body.asked)
        if counted:
            await self._count(while_here)
        try:
            self._reservation = await self._admit(asking.exchange_id, while_here)
        except Refusal:
            # What was seen last of the limits may have been too old to tell that it would be tight.
            if counted or not self._worth_counting():
                raise
            await self._count(while_here)
            # Of the first try something may still be on its way, and be undone by its id.
            self._reservation = await self._admit(f"{asking.exchange_id}/counted", while_here)

    async def _count(self, while_here: WhileHere) -> None:
        asking = self._asking
        self._counts = await while_here(self._sizes.count(asking.route, asking.body))
        self._need = self._sizes.need(
            asking.route, asking.body.asked, asking.prices.tiers, most=self.strict, counts=self._counts
        )

    def _worth_counting(self) -> bool:
        return bool(self._accounts) and self._admission.tight(self._asking.facts, self._need)

    async def _admit(self, id_: str, while_here: WhileHere) -> Reservation:
        asking = self._asking
        return await self._admission.admit(
            Request(id=id_, caller=asking.caller, facts=asking.facts, need=self._need, so_far=self._use),
            while_here,
        )

    def settle(self, at_ms: int = 0) -> None:
        """Count what was used and give back the rest. `at_ms`: when the bill was made, 0: now."""
        if self._reservation.held:
            self._reservation.settle(self._use(), at_ms)

    def door(self, number: int, attempt: PlannedAttempt) -> Door | None:
        """Return what attempt `number` has to go through; None where its tier takes as many as come."""
        if not self._admission.limits:
            return None
        facts = msgspec.structs.replace(self._asking.facts, tier=attempt.tier)
        bounded = tuple(one for one in self._accounts if one.limit.strict)
        if not bounded and not self._admission.accounts(facts):
            return None
        return _TierDoor(self, number, facts, attempt.backend, bounded)

    async def enter(self, number: int, facts: Facts, bounded: Sequence[Account], use: Callable[[], Use]) -> Reservation:
        """Reserve for one attempt. Raises `Full`."""
        asking = self._asking
        tier = facts.tier or ""
        need = self._sizes.need_of_attempt(
            asking.route, tier, asking.body.asked, asking.prices.tiers[tier], self._counts
        )
        for account in bounded:
            # Attempts that failed half way can have used what was reserved for this one.
            reserved, next_one = self._need.of(account.limit, account.meter), need.of(account.limit, account.meter)
            if account.used(self._use()) + next_one > reserved:
                raise Full(f"Limit '{account.limit.name}' leaves nothing for another attempt.")
        try:
            return await self._admission.admit(
                Request(id=f"{asking.exchange_id}/{number}", caller=asking.caller, facts=facts, need=need, so_far=use)
            )
        except Refusal as refusal:
            raise Full(refusal.message, refusal.retry_after_s) from None

    def cost(self, backend: str, usage: TokenUsage) -> Use:
        """Return what one attempt alone used."""
        amounts = Amounts(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            spend_nusd=cost_of(self._asking.prices.backends[backend], usage).total_nusd,
        )
        return Use(shown=amounts, of_all=amounts)


class _TierDoor:
    def __init__(
        self, allowance: Allowance, number: int, facts: Facts, backend: str, bounded: Sequence[Account]
    ) -> None:
        self._allowance = allowance
        self._number = number
        self._facts = facts
        self._backend = backend
        self._bounded = bounded
        self._reservation = Reservation()

    async def enter(self, usage: Callable[[], TokenUsage]) -> None:
        def so_far() -> Use:
            return self._allowance.cost(self._backend, usage())

        self._reservation = await self._allowance.enter(self._number, self._facts, self._bounded, so_far)

    def leave(self, usage: TokenUsage) -> None:
        self._reservation.settle(self._allowance.cost(self._backend, usage))


def user_digest(*said: str | bytes | None) -> str | None:
    """Return a digest of the first of several names of an end user; None where there is none.

    Whatever a client sends has one length, and is not kept.
    """
    user = next((one for one in said if one), None)
    if user is None:
        return None
    raw = user if isinstance(user, bytes) else user.encode("utf-8", "surrogatepass")
    return sha256(raw).hexdigest()[:32]


def used(runs: Sequence[Run], prices: PriceList, shown: Run | None) -> Use:
    """Return what an exchange has used: the answer that the client is `shown`, and all attempts."""
    of_all = [(usage := run.usage, cost_of(prices.backends[run.attempt.backend], usage).total_nusd) for run in runs]
    usage = TokenUsage() if shown is None else shown.usage
    return Use(
        shown=Amounts(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens),
        of_all=Amounts(
            input_tokens=sum(one.prompt_tokens for one, _ in of_all),
            output_tokens=sum(one.completion_tokens for one, _ in of_all),
            spend_nusd=sum(cost for _, cost in of_all),
        ),
    )
