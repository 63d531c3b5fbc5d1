"""Load on the gateway with locust: people who stream chat, in turns that grow; a trace; a batch in the background.

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 --model smollm2 -u 20 -t 60s \
        --csv loadtest-run/locust --html loadtest-run/locust.html --slo-ttft-p95-s 1 --slo-error-share 0.01
    python -m loadtest locust-report loadtest-run

TTFT, ITL, TPOT and tokens/s stand in locust's table beside E2E (POST), one entry for each band. They are entries of
their own, not requests, so that the row "Aggregated" counts requests only. Every request is also a line in
`RUN_DIR/records-PID.jsonl`, from which goals are judged exactly and the report is drawn.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import gevent
import gevent.pool
from locust import FastHttpUser, LoadTestShape, events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, ResponseContextManager
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtest.conversations import Conversation, Workload
from loadtest.scenarios.goals import goals_table
from loadtest.swarm import answer as answers
from loadtest.swarm import shapes, trace
from loadtest.swarm.answer import Answer, Record
from loadtest.swarm.figures import SLOS, goals
from loadtest.swarm.people import Caller, answer_tokens, callers, parse_bands, parse_keys, population, think_s
from loadtest.swarm.run import RECORDS, read_records

CHAT = "/v1/chat/completions"
REPLAY = "replay"
MOST_AT_ONCE = 2_000
"""Of a replayed trace: what is due while so many are under way is counted as `no_connection`, not sent."""
USERS_PER_S = 100.0
"""That are started where `-r` says nothing; locust's own 1 would make a slope of every spike."""
BATCH_POLL_S = 2.0


class Swarm:
    """What all users of one locust process share. Owns the file of records, from `open` to `close`."""

    def __init__(self, options: Any) -> None:
        keys_text = Path(options.keys_file).read_text() if options.keys_file else options.keys or ""
        keys, shares = parse_keys(keys_text), parse_bands(options.bands)
        self.options = options
        self.directory = Path(options.run_dir)
        self.lasts_s = float(options.run_time or options.lasts_s)
        self.arrivals = _arrivals(Path(options.trace)) if options.load_shape == REPLAY else []
        self.shape = None if self.arrivals else self._shape()
        load = Workload(48, options.turns, options.systems, options.system_words, options.question_words)
        self.talks: Iterator[Conversation] = population(load, options.seed)
        self.callers: Iterator[Caller] = callers(keys, shares, options.seed)
        self.random = random.Random(options.seed)
        self.replay_is_over = False
        self._file: IO[bytes] | None = None

    def _shape(self) -> shapes.Shape:
        asked = self.options
        peak = asked.num_users or 1
        low = peak // 4 if asked.low_users is None else asked.low_users
        return shapes.shape(asked.load_shape, low, peak, self.lasts_s, steps=asked.steps, day_s=asked.day_s)

    @property
    def promised(self) -> dict[str, float]:
        """The goals that were asked for, by name."""
        asked = {name: getattr(self.options, f"slo_{name}") for name in SLOS}
        return {name: value for name, value in asked.items() if value is not None}

    def open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = (self.directory / f"records-{os.getpid()}.jsonl").open("wb")

    def keep(self, record: Record) -> None:
        if self._file is not None:
            self._file.write(answers.encode(record))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def swarm_of(environment: Environment) -> Swarm:
    """Set once, when locust has read its options."""
    return cast("Swarm", environment.sluice)  # type: ignore[attr-defined]


def _arrivals(file: Path) -> list[trace.Arrival]:
    """A trace to replay, in any format that can be converted. Raises OSError, ValueError."""
    with file.open(encoding="utf-8", newline="") as lines:
        found = trace.window(trace.convert(lines))
    if not found:
        raise ValueError(f"{file} holds no request")
    return found


class Shape(LoadTestShape):
    """The load shape that was asked for; a replay lasts until its last answer, or 10 minutes after its last arrival."""

    use_common_options = True

    def tick(self) -> tuple[int, float, list[Any]] | None:
        assert self.runner is not None
        swarm = swarm_of(self.runner.environment)
        background: list[Any] = [BatchUser] if swarm.options.batch_lines else []
        if swarm.shape is None:
            late = self.get_run_time() > swarm.arrivals[-1].at_s + 600
            is_over = swarm.replay_is_over or late
            return None if is_over else (1 + len(background), USERS_PER_S, [TraceUser, *background])
        users = swarm.shape.users(self.get_run_time())
        rate = max(1.0, swarm.options.spawn_rate)
        return None if users is None else (users + len(background), rate, [ChatUser, *background])


class Asked(NamedTuple):
    """What became of a request, and how long to wait before asking again if it was refused."""

    record: Record
    answer: Answer
    wait_s: float


class Asker(FastHttpUser):
    """Sends requests and measures their answers."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        self.swarm = swarm_of(environment)
        self.network_timeout = self.swarm.options.silence_s
        super().__init__(environment)

    def ask(self, kind: str, caller: Caller, body: Mapping[str, Any], late_s: float = 0.0) -> Asked:
        """One request, due `late_s` ago."""
        begun_s = time.perf_counter() - late_s
        asked = Record(time.time() - late_s, kind, caller.band, caller.tenant)
        answer = Answer(begun_s)
        content = json.dumps({**body, "service_tier": caller.band, "stream_options": {"include_usage": True}})
        how: dict[str, Any] = {"stream": True, "catch_response": True, "name": f"chat {caller.band}"}
        head = {**_bearer(caller), "content-type": "application/json"}
        with self.client.post(CHAT, data=content, headers=head, **how) as response:
            status, headers = _hear(response, answer)
            record = answer.record(asked, status, headers, time.perf_counter())
            response.request_meta["response_time"] = record.took_s * 1e3
            if record.is_served:
                response.success()
            else:
                response.failure(f"{record.status} {record.code}".strip())
        self.swarm.keep(record)
        self._log(record)
        return Asked(record, answer, answers.retry_after_s(headers, self.swarm.options.retry_after_cap_s))

    def _log(self, record: Record) -> None:
        """Entries beside locust's own, which counts milliseconds; tokens/s is what it says."""
        entry = self.environment.stats.get
        if record.ttft_s is not None:
            entry(record.band, "TTFT").log(round(record.ttft_s * 1e3), 0)
        for gap_s in record.gaps_s:
            entry(record.band, "ITL").log(round(gap_s * 1e3), 0)
        if record.is_served and record.tpot_s is not None:
            entry(record.band, "TPOT").log(round(record.tpot_s * 1e3), 0)
            entry(record.band, "tokens/s").log(round(record.tokens / record.took_s), 0)


def _bearer(caller: Caller) -> dict[str, str]:
    return {"authorization": f"Bearer {caller.key}"} if caller.key else {}


def _hear(response: ResponseContextManager, answer: Answer) -> tuple[int, dict[str, str]]:
    """Read the answer to its end; status 0 where none came. What is cut off shows in the answer."""
    status = response.status_code
    if not status or response.headers is None:
        answer.code = type(getattr(response, "error", None)).__name__
        return 0, {}
    headers = {str(name).lower(): str(value) for name, value in response.headers.items()}
    try:
        if status != 200:
            answer.code = answers.error_code(status, response.content or b"")
            return status, headers
        while line := response.stream.readline(b"\n"):
            answer.hear(bytes(line), time.perf_counter())
    except FAILURE_EXCEPTIONS:
        pass
    finally:
        if not answer.is_done and response.stream is not None:
            response.stream.release()
    return status, headers


class ChatUser(Asker):
    """Somebody who talks: turn after turn with the same growing prefix, and pauses to think."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._caller = next(self.swarm.callers)
        self._talk = next(self.swarm.talks)

    def wait_time(self) -> float:
        return think_s(self.swarm.random, self.swarm.options.think_s)

    @task
    def turn(self) -> None:
        options = self.swarm.options
        body = self._talk.ask(options.model, answer_tokens(self.swarm.random, options.answer_tokens))
        for attempt in itertools.count():
            record, answer, wait_s = self.ask("chat", self._caller, body)
            if not record.is_refused or attempt >= options.retries:
                break
            gevent.sleep(wait_s)
        self._talk.hear(answer.text)
        if not record.is_served or not self._talk.questions:
            self._talk = next(self.swarm.talks)


class TraceUser(Asker):
    """Plays a trace: every request at its time, whether or not earlier ones were answered."""

    fixed_count = 1
    concurrency = MOST_AT_ONCE

    @task
    def play(self) -> None:
        under_way = gevent.pool.Pool(MOST_AT_ONCE)
        begun_s = time.perf_counter()
        for arrival in self.swarm.arrivals:
            gevent.sleep(max(0.0, begun_s + arrival.at_s - time.perf_counter()))
            late_s = time.perf_counter() - begun_s - arrival.at_s
            if under_way.full():
                self.swarm.keep(Record(time.time() - late_s, REPLAY, code="no_connection"))
            else:
                under_way.spawn(self._one, arrival, next(self.swarm.callers), late_s)
        under_way.join()
        self.swarm.replay_is_over = True
        self.stop()

    def _one(self, arrival: trace.Arrival, caller: Caller, late_s: float) -> None:
        options = self.swarm.options
        body = {
            "model": options.model,
            "messages": [{"role": "user", "content": trace.prompt(arrival, options.seed)}],
            "stream": True,
            "max_tokens": arrival.answer_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        self.ask(REPLAY, caller, body, late_s)


class BatchUser(Asker):
    """Batches in the background, one after another; what is open at the end is cancelled."""

    fixed_count = 1

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._caller = next(self.swarm.callers)
        self._open = ""

    def on_stop(self) -> None:
        if self._open:
            self.client.post(f"/v1/batches/{self._open}/cancel", name="batch cancel", headers=_bearer(self._caller))

    @task
    def batch(self) -> None:
        begun_s, at_s = time.perf_counter(), time.time()
        self._open = self._create(self._upload())
        state: dict[str, Any] = {}
        while self._open and state.get("status") not in {"completed", "failed", "expired", "cancelled"}:
            gevent.sleep(BATCH_POLL_S)
            got = self.client.get(f"/v1/batches/{self._open}", name="batch poll", headers=_bearer(self._caller))
            state = got.json() if got.status_code == 200 else {}
        self._open = ""
        if not state:
            gevent.sleep(BATCH_POLL_S)
            return
        code = "" if state["status"] == "completed" else state["status"]
        took_s = time.perf_counter() - begun_s
        tokens = (state.get("usage") or {}).get("output_tokens", 0)
        self.swarm.keep(Record(at_s, "batch", "batch", self._caller.tenant, 200, code, took_s=took_s, tokens=tokens))

    def _upload(self) -> str:
        """The id of a new input file; empty when it was refused."""
        options = self.swarm.options
        boundary = f"sluice-{self.swarm.random.getrandbits(64):x}"
        lines = "\n".join(self._line(number) for number in range(options.batch_lines))
        body = (
            f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="lines.jsonl"\r\n'
            f"content-type: application/jsonl\r\n\r\n{lines}\n\r\n--{boundary}--\r\n"
        )
        head = {**_bearer(self._caller), "content-type": f"multipart/form-data; boundary={boundary}"}
        answer = self.client.post("/v1/files", name="batch file", data=body, headers=head)
        return str(answer.json()["id"]) if answer.status_code == 200 else ""

    def _line(self, number: int) -> str:
        talk = next(self.swarm.talks)
        body = talk.ask(self.swarm.options.model, self.swarm.options.answer_tokens)
        del body["stream"]
        return json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body})

    def _create(self, file: str) -> str:
        if not file:
            return ""
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        answer = self.client.post("/v1/batches", name="batch create", json=body, headers=_bearer(self._caller))
        return str(answer.json()["id"]) if answer.status_code == 200 else ""


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser) -> None:
    parser.set_defaults(spawn_rate=USERS_PER_S)
    add = parser.add_argument
    add("--model", default="smollm2", help="what is asked for")
    add("--load-shape", choices=(*shapes.NAMES, REPLAY), default="steady", help="-u is its peak, -t its length")
    add("--lasts-s", type=float, default=60.0, help="how long, where -t does not say it")
    add("--low-users", type=int, help="of step, spike and diurnal; default: a quarter of -u")
    add("--steps", type=int, default=4, help="of the shape step")
    add("--day-s", type=float, default=120.0, help="of the shape diurnal")
    add("--trace", default=str(Path(__file__).with_name("traces") / "synthetic.jsonl"), help="of replay")
    add("--keys-file", help="a file of tenant=key lines")
    add("--keys", env_var="SLUICE_LOADTEST_KEYS", is_secret=True, help="tenant=key,…; better in the environment")
    add("--bands", default="priority=1,default=6,flex=3", help="shares of the users")
    add("--think-s", type=float, default=5.0, help="mean pause between turns")
    add("--turns", type=int, default=5, help="of a conversation")
    add("--systems", type=int, default=3, help="system prompts that conversations share")
    add("--system-words", type=int, default=150)
    add("--question-words", type=int, default=60)
    add("--answer-tokens", type=int, default=48, help="median; from half to twice of it")
    add("--batch-lines", type=int, default=0, help="of each batch in the background; 0: none")
    add("--retries", type=int, default=3, help="of a refused turn, each after its Retry-After")
    add("--retry-after-cap-s", type=float, default=30.0, help="longest wait that is honoured")
    add("--silence-s", type=float, default=120.0, help="longest wait for the next byte")
    add("--seed", type=int, default=1)
    add("--run-dir", default="loadtest-run", help="where the records go")
    for name, what in SLOS.items():
        bound = "at least" if name == "tokens_per_s" else "at most"
        add(f"--slo-{name.replace('_', '-')}", type=float, metavar="X", help=f"exit code 1 unless {what} is {bound} X")


@events.init.add_listener
def _begin(environment: Environment, **_: object) -> None:
    try:
        environment.sluice = Swarm(environment.parsed_options)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if not isinstance(environment.runner, WorkerRunner):
        for left in swarm_of(environment).directory.glob(RECORDS):
            left.unlink()


@events.test_start.add_listener
def _open(environment: Environment, **_: object) -> None:
    swarm_of(environment).open()


@events.test_stop.add_listener
def _close(environment: Environment, **_: object) -> None:
    swarm_of(environment).close()


@events.quitting.add_listener
def _judge(environment: Environment, **_: object) -> None:
    """Goals decide the exit code: 0 or 1. Without any locust's own rule holds."""
    swarm = swarm_of(environment)
    swarm.close()
    if isinstance(environment.runner, WorkerRunner) or not swarm.promised:
        return
    judged = goals(read_records(swarm.directory), swarm.promised)
    print("\n" + goals_table(judged), flush=True)
    environment.process_exit_code = 0 if all(goal.is_met for goal in judged) else 1
