"""What one variant did, as numbers that can be added: totals of a process, or their growth over a while. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Tally(msgspec.Struct, array_like=True, frozen=True):
    """Generated tokens, requests that ended (whatever their outcome), and TTFTs by the number of their bucket in
    `telemetry.metrics.TTFT_BUCKETS`, of which the last, one beyond them, has no upper edge."""

    tokens: float = 0.0
    ended: float = 0.0
    ttfts: Mapping[int, float] = {}

    def __add__(self, other: Tally) -> Tally:
        ttfts = {bucket: self._in(bucket) + other._in(bucket) for bucket in {**self.ttfts, **other.ttfts}}
        return Tally(self.tokens + other.tokens, self.ended + other.ended, ttfts)

    def since(self, before: Tally) -> Tally:
        """What has come since `before`, of the same process. Buckets in which nothing has are left out."""
        grown = {bucket: count - before._in(bucket) for bucket, count in self.ttfts.items()}
        ttfts = {bucket: count for bucket, count in grown.items() if count}
        return Tally(self.tokens - before.tokens, self.ended - before.ended, ttfts)

    def __bool__(self) -> bool:
        return bool(self.tokens or self.ended or self.ttfts)

    def _in(self, bucket: int) -> float:
        return self.ttfts.get(bucket, 0.0)


NOTHING_YET = Tally()
