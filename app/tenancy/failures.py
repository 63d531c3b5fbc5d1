"""How often an address has failed to say who it is. Pure: times are monotonic seconds."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

ADDRESSES = 4096
IPV6_PREFIX = 64


class Failures:
    """A token bucket for each address: `per_min` failures at once, refilled evenly over a minute.

    Whoever holds a good key is never asked about it, so nobody can lock out the others behind the same proxy. At most
    ADDRESSES are remembered; the one that failed longest ago is forgotten first, an attacker with more addresses than
    that gains some further refusals of the cheap kind.
    """

    def __init__(self, per_min: int) -> None:
        self._capacity = float(per_min)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, address: str, now: float) -> float:
        """One more failure of `address`. Seconds until it may fail again; 0 if it may now."""
        network = network_of(address)
        left, since = self._buckets.pop(network, (self._capacity, now))
        left = min(self._capacity, left + (now - since) * self._capacity / 60)
        wait_s = max(0.0, (1 - left) * 60 / self._capacity)
        self._buckets[network] = (left if wait_s else left - 1, now)
        if len(self._buckets) > ADDRESSES:
            self._buckets.popitem(last=False)
        return wait_s


def network_of(address: str) -> str:
    """The address itself, or the /64 of an IPv6 address: what one host can choose from freely."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], IPV6_PREFIX), strict=False))
    except ValueError:
        return address
