"""What was spent before the store lost its data? Totals from a file, as entries for the accounts they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from gateway.admission import Admission
from gateway.allowance import user_digest
from gateway.config.units import UnitError, parse_usd
from policies.accounts import Entry
from policies.limits import Account, Facts, Limit, Need, accounts_of


class TotalsError(ValueError):
    """The totals cannot be used; the message names the line of the list and what is wrong with it."""


class Total(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one limit has counted in its present window: `scope` names whom, `usd` is a decimal number of dollars."""

    limit: str
    scope: dict[str, str] = {}
    usd: str


class Totals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a file of totals."""

    totals: tuple[Total, ...]


def read_totals(data: bytes) -> Totals:
    """Read a file. Raises `TotalsError`."""
    try:
        return msgspec.json.decode(data, type=Totals)
    except msgspec.DecodeError as error:
        raise TotalsError(str(error)) from None


def entries_of(totals: Totals, admission: Admission) -> Mapping[str, tuple[Entry, ...]]:
    """Return what to seed, by partition. Raises `TotalsError` with everything that fits no limit."""
    found: dict[str, list[Entry]] = {}
    faults: list[str] = []
    for number, total in enumerate(totals.totals):
        try:
            partition, entry = _entry(total, admission)
        except TotalsError as fault:
            faults.append(f"totals[{number}]: {fault}")
        else:
            found.setdefault(partition, []).append(entry)
    if faults:
        raise TotalsError("\n".join(faults))
    return {partition: tuple(entries) for partition, entries in found.items()}


def _entry(total: Total, admission: Admission) -> tuple[str, Entry]:
    limit = next((one for one in admission.limits if one.name == total.limit), None)
    if limit is None:
        raise TotalsError(f"there is no limit '{total.limit}'")
    wanted = [dimension for dimension, _ in limit.scope]
    if set(wanted) != set(total.scope):
        said = ", ".join(wanted) or "nothing"
        raise TotalsError(f"the scope of '{limit.name}' has {said}; found {', '.join(total.scope) or 'nothing'}")
    facts = _facts(total.scope)
    account = _spend(accounts_of([limit], facts), limit)
    try:
        nusd = parse_usd(total.usd)
    except UnitError as error:
        raise TotalsError(f"usd: {error}") from None
    entry = account.entry(Need.nothing(), admission.now_ms())
    return admission.partition_of(facts, [account]), msgspec.structs.replace(entry, taken=nusd, held=0)


def _spend(accounts: Iterable[Account], limit: Limit) -> Account:
    for account in accounts:
        if account.meter.measure == "spend":
            return account
    raise TotalsError(f"'{limit.name}' does not limit spending there")


def _facts(scope: Mapping[str, str]) -> Facts:
    return Facts(
        key=scope.get("key", ""),
        team=scope.get("team"),
        user=user_digest(scope.get("user")),
        route=scope.get("route", ""),
        model=scope.get("model", ""),
        tier=scope.get("tier"),
    )
