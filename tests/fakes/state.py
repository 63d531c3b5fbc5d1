"""What the routes of one fake worker share: its options, engine, observer, and the faults in force."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from http import HTTPStatus

from tests.fakes.engine import Engine, PrefixCache, Timing
from tests.fakes.faults import Faults, parse_faults
from tests.fakes.metrics_page import Statistics
from tests.fakes.observation import Observer
from tests.fakes.refusals import refusal
from tests.fakes.server import Exchange, Header
from tests.fakes.vocabulary import Vocabulary

BLOCK_SIZE = 32
BLOCKS = 182
VERSION = "0.32.0"


@dataclass(frozen=True, slots=True)
class Options:
    """Fixed for the life of a worker object; named after vLLM's flags, off by default as there."""

    task: str = "generate"
    max_model_len: int = 2048
    max_num_seqs: int = 256
    max_num_queued_reqs: int | None = None
    prompt_tokens_details: bool = False
    request_id_headers: bool = False
    server_load_tracking: bool = False
    version: str = VERSION


class State:
    """One worker's state. `boot` is a new process of it: an empty engine and cache, its own metrics at zero."""

    def __init__(self, model: str, options: Options, timing: Timing, faults: Faults, observer: Observer) -> None:
        self.model = model
        self.options = options
        self.timing = timing
        self.faults = faults
        self.observer = observer
        self.vocabulary = Vocabulary()
        self._uses_left: int | None = None
        self._healed = asyncio.Event()
        self.boot()

    def boot(self) -> None:
        self.engine = Engine(self.options.max_num_seqs, PrefixCache(BLOCK_SIZE, BLOCKS), self.observer.changed)
        self.statistics = Statistics()

    def inject(self, fault: str, times: int | None) -> None:
        self.faults = parse_faults(fault)
        self._uses_left = times

    def heal(self, *, for_good: bool = False) -> None:
        self.faults = Faults()
        self._uses_left = None
        self._healed.set()
        if not for_good:
            self._healed = asyncio.Event()

    def use_faults(self) -> Faults:
        """The worker's own faults for one more inference request."""
        faults = self.faults
        if self._uses_left is not None:
            self._uses_left -= 1
            if self._uses_left <= 0:
                self.faults, self._uses_left = Faults(), None
        return faults

    async def hang(self) -> None:
        """Wait until the worker is healed."""
        await self._healed.wait()

    def headers(self, exchange: Exchange) -> list[Header]:
        """What vLLM's middleware puts on every answer."""
        headers = [("vary", "Origin")]
        if self.options.request_id_headers:
            headers.append(("x-request-id", exchange.request.header("x-request-id") or uuid.uuid4().hex))
        return headers

    def check_model(self, name: str) -> None:
        """Raises Refusal for a model that is not served; what follows `!` names a fault."""
        if name.partition("!")[0] != self.model.partition("!")[0]:
            message = f"The model `{name}` does not exist. Valid aliases: {self.model}."
            raise refusal(HTTPStatus.NOT_FOUND, message, "NotFoundError", "model")
