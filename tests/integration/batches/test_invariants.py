"""I17 to I20: gateways that die, sleep and run out of disk at any write, claims that end early or are forgotten, lines
that are taken off their workers.

Whatever happens, a witness that takes part in nothing reads everything anew from the directory and compares it with
what clients were told and what was there before.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import Phase
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.batches.batch import Batch, Progress, Status
from app.batches.batches import Asked
from app.batches.files import Files
from app.batches.journal import Journal
from app.batches.runner import ORPHAN_S
from app.errors import GatewayError
from tests.integration.batches.house import AFTER, CHAT, jsonl, line
from tests.integration.batches.mortals import LIMITS, Died, Disk, MortalGateway, Notes, Table, Workers
from tests.stepping import SteppingLoop

TENANT = "t"
WINDOW_S = 1000
GATEWAYS = 2
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where syncing costs nothing
HEALING_LOOKS = 60
ENDINGS = ("", "", "", "bad", "shaky")

T = TypeVar("T")


@dataclass(frozen=True)
class Order:
    """A call that made a batch: it may be made again."""

    asked: Asked
    batch_id: str


class BatchesUnderFaults(RuleBasedStateMachine):
    """Every rule is something that a client, a gateway or fate may do at any time."""

    @initialize()
    def begin(self) -> None:
        place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        self.place = tempfile.TemporaryDirectory(dir=place)
        self.loop = SteppingLoop()
        self.notes = Notes()
        self.loop.set_exception_handler(self._note)
        self.jumped_s = 0.0
        self.is_healing = False
        self.disk = Disk(Path(self.place.name))
        self.table = Table(self.loop)
        self.workers = Workers()
        self.gateways: list[MortalGateway] = []
        self.witness = Journal(self.disk.open(), self._wall)
        self.files = Files(self.disk.open(), self._wall)
        self.made = 0
        self.inputs: dict[str, list[str]] = {}
        self.orders: list[Order] = []
        self.seen: dict[str, tuple[Batch, Progress]] = {}
        self.published: dict[str, bytes] = {}
        self.asked_at_end: dict[str, int] = {}
        self.doubtful: set[str] = set()
        self._bury()

    # what clients do

    @precondition(lambda self: self._answering())
    @rule(data=st.data(), endings=st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=7), keyed=st.booleans())
    def create(self, data: st.DataObject, endings: list[str], keyed: bool) -> None:
        """Upload and create; the gateway may die on the way. Told is told."""
        self._create(data.draw(st.sampled_from(self._answering())), endings, keyed=keyed)
        self._pass(0.6)

    @precondition(lambda self: self._answering())
    @rule()
    def create_too_late(self) -> None:
        """Nobody gets to look through the input until the window is over."""
        self.table.is_down = True
        self._create(self._answering()[0], ENDINGS[:2], keyed=False)
        self.jumped_s += WINDOW_S
        self._be_well()
        self._pass(0.6)

    def _create(self, gateway: MortalGateway, endings: Sequence[str], *, keyed: bool) -> None:
        self.made += 1
        ids = [f"b{self.made}l{number}{ending}" for number, ending in enumerate(endings)]
        text = jsonl(line(custom_id, user=custom_id) for custom_id in ids)
        with suppress(Died, GatewayError):
            kept_s = LIMITS.files_kept_s
            file = self._do(gateway.files.add(TENANT, _pieces(text), filename="f", purpose="batch", kept_s=kept_s))
            self.inputs[file.id] = ids
            asked = Asked(file.id, CHAT, f"{WINDOW_S}s", None, None, text, f"key{self.made}" if keyed else None)
            self.orders.append(Order(asked, self._do(gateway.batches.create(TENANT, asked)).id))

    @precondition(lambda self: self._answering() and any(order.asked.key for order in self.orders))
    @rule(data=st.data())
    def create_again(self, data: st.DataObject) -> None:
        """A client repeats a call that was answered: it gets the batch that it has."""
        order = data.draw(st.sampled_from([order for order in self.orders if order.asked.key]))
        gateway = data.draw(st.sampled_from(self._answering()))
        with suppress(Died, GatewayError):
            assert self._do(gateway.batches.create(TENANT, order.asked)).id == order.batch_id

    @precondition(lambda self: self._answering() and self.orders)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        order = data.draw(st.sampled_from(self.orders))
        gateway = data.draw(st.sampled_from(self._answering()))
        with suppress(Died, GatewayError):
            self._do(gateway.batches.cancel(TENANT, order.batch_id))
        self._pass(0.1)

    # what gateways do; one that ends is started again

    @rule(seconds=st.sampled_from([0.6, 1.5, 5.0, 20.0]))
    def live(self, seconds: float) -> None:
        self._pass(seconds)

    @precondition(lambda self: self._answering())
    @rule(data=st.data(), writes=st.integers(1, 12), dies_after=st.booleans())
    def doom(self, data: st.DataObject, writes: int, dies_after: bool) -> None:
        """It will be killed at a write to come, just before or just after."""
        fate = data.draw(st.sampled_from(self._answering())).fate
        fate.writes_left, fate.dies_after = writes, dies_after
        self._pass(1)

    @precondition(lambda self: self._answering())
    @rule(data=st.data(), is_killed=st.booleans())
    def end(self, data: st.DataObject, is_killed: bool) -> None:
        fate = data.draw(st.sampled_from(self._answering())).fate
        fate.die() if is_killed else fate.ended.set()
        self._pass(0.3)

    @precondition(lambda self: self._answering())
    @rule(data=st.data(), seconds=st.sampled_from([1.0, 5.0, 9.0]))
    def sleep(self, data: st.DataObject, seconds: float) -> None:
        fate = data.draw(st.sampled_from(self._answering())).fate
        fate.awake.clear()
        self.loop.call_later(seconds, fate.awake.set)
        self._pass(0.3)

    # what fate does

    @precondition(lambda self: self.disk.late)
    @rule(data=st.data())
    def arrive_late(self, data: st.DataObject) -> None:
        """The last write of somebody who is dead: it was on its way."""
        key, text = self.disk.late.pop(data.draw(st.integers(0, len(self.disk.late) - 1)))
        self._do(self.disk.open().create(key, text))

    @rule()
    def forget(self) -> None:
        self.table.forget()
        self._doubt()
        self._pass(0.3)

    @rule(seconds=st.sampled_from([1.0, 5.0]))
    def err(self, seconds: float) -> None:
        """For a while everybody is given everything: claims save work, and no record may depend on them."""
        self.table.is_wrong = True
        self._doubt()
        self.loop.call_later(seconds, self._be_well)
        self._pass(0.6)

    @rule(seconds=st.sampled_from([1.0, 5.0]), what=st.sampled_from(["claims", "disk"]))
    def fail(self, seconds: float, what: str) -> None:
        """The claims are out of reach, or the disk is full, for a while."""
        self.table.is_down, self.disk.is_full = what == "claims", what == "disk"
        self.loop.call_later(seconds, self._be_well)
        self._pass(0.3)

    @precondition(lambda self: self.workers.preemptible)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """Better requests want the slots of some lines, at once."""
        for preempted in data.draw(st.lists(st.sampled_from(list(self.workers.preemptible)), min_size=1)):
            preempted()
        self._pass(data.draw(st.sampled_from([0.0, 0.01, 0.3])))

    @rule(seconds=st.sampled_from([1.0, 5.0]))
    def press(self, seconds: float) -> None:
        """For a while every line's slot is wanted."""
        self.workers.is_pressed = True
        self.loop.call_later(seconds, self._relax)
        self._pass(0.6)

    @rule()
    def windows_end(self) -> None:
        self.jumped_s += WINDOW_S
        self._pass(0.6)

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def publish_again(self, data: st.DataObject) -> None:
        """Somebody who was asleep ends what has ended: the file stays as it was (see `holds`)."""
        file_id = data.draw(st.sampled_from(sorted(self.published)))
        self._do(self.files.publish(TENANT, file_id, _pieces(b"other"), "f", "batch_output", 3600))

    # what must hold

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "witness"):
            return
        assert not self.notes.failures
        found = self._do(self._look())
        assert {order.batch_id for order in self.orders} <= found.keys(), "I17: an acknowledged batch is gone"
        for batch_id, (batch, progress) in found.items():
            self._check_step(self.seen.get(batch_id), batch, progress)
            self._do(self._check_files(batch, progress))
            if batch.status.is_final and batch_id not in self.doubtful:
                asked = self._dispatched(batch)
                assert self.asked_at_end.setdefault(batch_id, asked) == asked, "I20: dispatched after the end"
        self.seen = found

    def _check_step(self, before: tuple[Batch, Progress] | None, batch: Batch, progress: Progress) -> None:
        assert progress.lines <= batch.total, "I19: more than there are"
        if before is not None:
            was, done = before
            assert progress.completed >= done.completed, "I19: counts only grow"
            assert progress.failed >= done.failed, "I19: counts only grow"
            assert batch.status is was.status or batch.status in AFTER[was.status], "I19: no step back"

    async def _check_files(self, batch: Batch, progress: Progress) -> None:
        """I18: published files stay as they are; each custom_id has one record."""
        if batch.closing is None or batch.closed is None:
            return
        told: Counter[str] = Counter()
        for file_id, exists, lines in (
            (batch.closing.output_file_id, batch.closed.has_output, progress.completed),
            (batch.closing.error_file_id, batch.closed.has_errors, progress.failed),
        ):
            if exists:
                record = await self.files.find(TENANT, file_id)
                content = b"".join([chunk async for chunk in self.files.content(TENANT, record)])
                assert self.published.setdefault(file_id, content) == content, "I18: a published file changed"
                ids = [json.loads(text)["custom_id"] for text in content.splitlines()]
                assert len(ids) == lines, "I18: the counts are not the files'"
                told.update(ids)
                if batch.status is Status.COMPLETED and file_id == batch.closing.error_file_id:
                    assert all(name.endswith(("bad", "shaky")) for name in ids), "a line failed, and nothing was wrong"
        expected = Counter(self.inputs[batch.created.input_file_id])
        if batch.status in (Status.COMPLETED, Status.EXPIRED):
            assert told == expected, "I18: one record for each line"
        else:
            assert told <= expected, "I18: at most one record for each line"

    def teardown(self) -> None:
        if not hasattr(self, "witness"):
            return
        try:
            self._heal()
            self.holds()
            for batch, progress in self.seen.values():
                assert batch.status.is_final, "V1: it can always come to an end"
                if batch.status is Status.COMPLETED:
                    assert progress.lines == batch.total, "I18"
            assert self._do(self.witness.active()) == []
            self._age()
            assert [path for path in self.disk.root.rglob("objects/**/*") if path.is_file()] == [], "something stays"
        finally:
            for gateway in self.gateways:
                gateway.fate.die()
                gateway.life.cancel()
            self._pass(30, is_last=True)
            self.loop.close()
            self.place.cleanup()

    def _heal(self) -> None:
        """All is well again but for the slots, which others want; then every batch must come to its end."""
        self._be_well()
        self.workers.is_pressed = self.is_healing = True
        for gateway in self.gateways:
            gateway.fate.awake.set()
        self.jumped_s += 2 * ORPHAN_S  # marks of batches that never came to be are swept after that
        for _ in range(HEALING_LOOKS):
            self._pass(5)
            if not self._do(self.witness.active()):
                return

    def _age(self) -> None:
        """Long after everything is over a gateway starts, which is when it sweeps."""
        self.jumped_s += 2 * (LIMITS.files_kept_s + LIMITS.batches_kept_s)
        for gateway in self.gateways:
            gateway.fate.ended.set()
        self._pass(8)
        self._pass(1)

    # doing it

    def _answering(self) -> list[MortalGateway]:
        return [gateway for gateway in self.gateways if gateway.can_answer]

    def _wall(self) -> float:
        return 1_790_000_000.0 + self.loop.time() + self.jumped_s

    def _pass(self, seconds: float, *, is_last: bool = False) -> None:
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run_forever()
        if not is_last:
            self._bury()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self.loop.run_until_complete(work)
        finally:
            self._bury()

    def _bury(self) -> None:
        """Who has ended is started again, as something new."""
        for gateway in self.gateways:
            if gateway.fate.is_dead:
                gateway.life.cancel()
        self.gateways = [gateway for gateway in self.gateways if not gateway.fate.ended.is_set()]
        while len(self.gateways) < GATEWAYS:
            self.gateways.append(MortalGateway(self.disk, self.table, self.workers, self.notes, self._wall))

    def _be_well(self) -> None:
        self.disk.is_full = self.table.is_down = self.table.is_wrong = False

    def _relax(self) -> None:
        self.workers.is_pressed = self.is_healing

    def _doubt(self) -> None:
        """Claims promise that nobody else is at work: not while they are wrong. What they are not for still holds."""
        self.doubtful.update(batch_id for batch_id, (batch, _) in self.seen.items() if not batch.status.is_final)

    def _note(self, loop: object, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), Died):
            self.notes.failures.append(str(context))

    async def _look(self) -> dict[str, tuple[Batch, Progress]]:
        page, _ = await self.witness.page(TENANT, after=None, limit=1000)
        return {batch.id: await self.witness.view(batch) for batch in page}

    def _dispatched(self, batch: Batch) -> int:
        ids = set(self.inputs[batch.created.input_file_id])
        return sum(user in ids for user in self.workers.dispatched)


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


PHASES = (Phase.explicit, Phase.generate)
"""What is found is told as it was found: to shrink it takes many minutes."""
EXAMPLES = int(os.environ.get("SLUICE_BATCH_EXAMPLES", "100"))

TestBatchesUnderFaults = BatchesUnderFaults.TestCase
TestBatchesUnderFaults.settings = profile(
    max_examples=EXAMPLES, stateful_step_count=20, deadline=None, derandomize=True, phases=PHASES, database=None
)
