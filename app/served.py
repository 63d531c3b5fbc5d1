"""The requests that this process serves now, so that they can be ended before their time."""

from __future__ import annotations

from collections.abc import Set
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

    def cut(self, error: GatewayError) -> None:
        """End all of them."""
        for request in list(self._requests):
            request.cut(error)

    def cut_of(self, key_ids: Set[str], error: GatewayError) -> int:
        """End those that came with one of these keys; how many they are."""
        meant = [request for request in self._requests if request.key_id in key_ids]
        for request in meant:
            request.cut(error)
        return len(meant)
