"""The requests that this process serves now, so that they can be ended before their time."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol

from app.errors import GatewayError


class Cuttable(Protocol):
    """A request that is being served; `key_id` is of the key that it came with, None where none is asked for."""

    key_id: str | None

    def cut(self, error: GatewayError) -> None:
        """End it with `error`, as soon as the event loop turns."""


class Served:
    """Each request tells when it begins and when it has ended."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: set[Cuttable] = set()

    def opened(self, request: Cuttable) -> None:
        self._requests.add(request)

    def closed(self, request: Cuttable) -> None:
        self._requests.discard(request)

    def __len__(self) -> int:
        return len(self._requests)

    def cut(self, error: GatewayError) -> int:
        """End all of them; how many they are."""
        return _cut(list(self._requests), error)

    def cut_of(self, key_ids: Set[str], error: GatewayError) -> int:
        """End those that came with one of these keys; how many they are."""
        return _cut([request for request in self._requests if request.key_id in key_ids], error)


def _cut(meant: Sequence[Cuttable], error: GatewayError) -> int:
    for request in meant:
        request.cut(error)
    return len(meant)
