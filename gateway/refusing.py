"""What is a client told of its limits? Headers on every answer, and the refusal that names the limit and its state."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from gateway.decision import Header
from gateway.errors import Refusal
from policies.accounts import Concurrency, Entry, Rate, Short, Standing
from policies.cost import usd
from policies.limits import Account, capacity, described, remaining

_UNKNOWN_WAIT_S = 1


def rate_headers(accounts: Sequence[Account], standings: Sequence[Standing]) -> list[Header]:
    """Return OpenAI's `x-ratelimit-*` for requests and for tokens: of each the limit that is nearest."""
    headers: list[Header] = []
    for word, measures in ((b"requests", ("requests",)), (b"tokens", ("tokens", "input_tokens", "output_tokens"))):
        nearest: tuple[float, int, int, int] | None = None
        for account, standing in zip(accounts, standings, strict=True):
            rule = account.meter.rule
            if account.meter.measure not in measures or account.limit.shadow or not isinstance(rule, Rate):
                continue
            left = remaining(rule, standing.used, standing.reserved)
            share = left / rule.burst
            if nearest is None or share < nearest[0]:
                nearest = share, rule.limit, left, standing.reset_ms
        if nearest is not None:
            _, limit, left, reset_ms = nearest
            headers += [
                (b"x-ratelimit-limit-" + word, b"%d" % limit),
                (b"x-ratelimit-remaining-" + word, b"%d" % left),
                (b"x-ratelimit-reset-" + word, shown_ms(reset_ms).encode()),
            ]
    return headers


def shown_ms(duration_ms: int) -> str:
    """Write a duration as OpenAI does: `6m0s`, `1.5s`, `20ms`."""
    if duration_ms < 1000:
        return f"{max(0, duration_ms)}ms"
    minutes, rest_ms = divmod(duration_ms, 60_000)
    seconds = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if not minutes:
        return seconds
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{seconds}"


def refusal_of(
    accounts: Sequence[Account], entries: Sequence[Entry], standings: Sequence[Standing], short: Sequence[Short]
) -> Refusal:
    """Say which limit keeps a request out, and when it will not.

    What can never fit is told first, then an exhausted budget, then the limit that keeps it out longest.
    """
    worst = max(short, key=lambda one: _weight(accounts[one.index], one))
    account, entry, standing = accounts[worst.index], entries[worst.index], standings[worst.index]
    headers = rate_headers(accounts, standings)
    what = f"{_name(account)} allows {_allowance(account)}"
    needed = _amount(account, max(1, entry.taken + entry.held))
    if worst.why == "never":
        message = f"{what}; this request needs {needed}, so it can never pass. Ask for less, such as fewer tokens."
        return Refusal("request_exceeds_limit", message, headers=headers)
    state = f"{_amount(account, standing.used)} used"
    if account.meter.measure != "requests":
        state += f", {_amount(account, standing.reserved)} reserved"
    if account.meter.measure == "spend" and worst.why == "used":
        ends = f" It begins anew in {shown_ms(worst.wait_ms)}." if worst.wait_ms > 0 else ""
        return Refusal(
            "insufficient_quota", f"{what}: {state}; this request needs up to {needed}.{ends}", headers=headers
        )
    waits_ms = [one.wait_ms for one in short]
    known = all(wait_ms >= 0 for wait_ms in waits_ms) and worst.why == "used"
    retry_after_s = max(_UNKNOWN_WAIT_S, ceil(max(waits_ms) / 1000))
    when = f"Try again in {retry_after_s} s" + ("." if known else " (an estimate: it depends on others).")
    return Refusal(
        "rate_limit_exceeded",
        f"{what}: {state}; this request needs {needed}. {when}",
        retry_after_s=retry_after_s,
        headers=headers,
    )


def why_closed(accounts: Sequence[Account]) -> Refusal:
    """Say that a limit cannot be counted now, and the operator wants nothing through uncounted."""
    names = ", ".join(dict.fromkeys(_name(account) for account in accounts))
    return Refusal("limits_unavailable", f"{names} cannot be counted at the moment.", retry_after_s=1)


def _weight(account: Account, short: Short) -> tuple[int, int]:
    if short.why == "never":
        return 3, 0
    if account.meter.measure == "spend" and short.why == "used":
        return 2, short.wait_ms if short.wait_ms >= 0 else 2**62
    return 1, short.wait_ms


def _name(account: Account) -> str:
    whom = account.whom.replace("|", ", ")
    return f"Limit '{account.limit.name}'" + (f" ({whom})" if whom else "")


def _allowance(account: Account) -> str:
    rule = described(account.meter)
    text = _amount(account, capacity(account.meter.rule))
    if isinstance(account.meter.rule, Concurrency):
        return text
    if isinstance(account.meter.rule, Rate):
        text = f"{_amount(account, account.meter.rule.limit)} per {rule['per']}"
        burst = account.meter.rule.burst
        return text if burst == account.meter.rule.limit else f"{text} ({burst} at once)"
    return f"{text} per {rule['per']}" if "per" in rule else f"{text} in total"


def _amount(account: Account, amount: int) -> str:
    measure = account.meter.measure
    if measure == "spend":
        return f"${usd(amount)}"
    noun = {"concurrent": "concurrent requests", "requests": "requests"}.get(measure, measure.replace("_", " "))
    return f"{amount} {noun}" if amount != 1 else f"1 {noun.removesuffix('s')}"
