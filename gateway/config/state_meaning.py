"""Do the settings of the store fit together? A configuration in, findings out."""

from __future__ import annotations

from gateway.config.findings import Findings, spot
from gateway.config.model import Config, RedisState
from gateway.config.problem import quoted
from gateway.config.shape import Mark

_LAST_PORT = 65535


def check_state(config: Config, findings: Findings) -> None:
    """Look at `state`; what is wrong goes to `findings`."""
    state = config.state
    if not isinstance(state, RedisState):
        return
    _addresses(state, findings)
    if ("state", "mode") in findings.broken:
        return
    if state.mode == "standalone" and len(state.addresses) > 1:
        message = "a second server, and `standalone` has one; `mode: sentinel` and `mode: cluster` have several"
        findings.error(("state", "addresses", 1), message)
    if state.mode == "sentinel" and state.master is None and findings.sound(("state",)):
        findings.error(("state", "mode"), "`sentinel` needs `master`, the name of the master that they watch")
    if state.mode != "sentinel" and state.master is not None:
        findings.error(("state", "master"), "means something with `mode: sentinel` only")
    if state.mode == "cluster" and state.database:
        findings.error(("state", "database"), "a cluster has only database 0; leave it out")


def _addresses(state: RedisState, findings: Findings) -> None:
    first: dict[str, Mark] = {}
    for i, address in enumerate(state.addresses):
        place = ("state", "addresses", i)
        if not address:
            continue
        port = int(address.rpartition(":")[2])
        if not 1 <= port <= _LAST_PORT:
            findings.error(place, f"{port} is no port; those are 1 to {_LAST_PORT}")
        if address in first:
            findings.error(place, f"{quoted(address)} twice; the first is at {spot(first[address])}")
        first.setdefault(address, findings.at(place))
