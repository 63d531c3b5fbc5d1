"""`sluice evaluate` as a user runs it, with stand-ins for what takes minutes.

The engine is the fake worker, the recipes' and the harness's interpreters answer at once; the command cannot tell.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.card import Card
from app.launcher.environments import HARNESS, RECIPES, STAMP, WORKER_CPU, Environment, Installer
from app.launcher.home import Home
from app.manifest import Manifest
from tests.integration.gateway.running import GatewayProcess
from tests.ports import free_port
from tests.processes import ROOT, Process
from tests.unit.cards import card, quality

DONE_S = 90.0
REFUSAL = "NotImplementedError: no kernel for this format"

ENGINE = """#!{python}
import os, sys
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
if "refused" in value("--model"):
    print({refusal!r}, flush=True)
    sys.exit(1)
os.chdir({root!r})
os.execv({python!r}, [{python!r}, "-m", "tests.fakes.worker", "--port", value("--port"),
                      "--model", value("--served-model-name")])
"""
DIVERGENCE = """#!{python}
import json, sys
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
variants = [sys.argv[at + 1].split("=")[0] for at, flag in enumerate(sys.argv) if flag == "--variant"]
text = dict(tokens=10, kl=0.5, js=0.1, agreeing=9, nll=21.0, dense_nll=20.0)
with open(value("--output"), "w") as output:
    for name in variants:
        found = {{"texts": [text, {{**text, "kl": 1.5}}]}}
        found = {{"error": "KeyError: what is this?"}} if name == "unreadable" else found
        print(json.dumps({{"variant": name, **found}}), file=output)
"""
HARNESS_ANSWERS = """#!{python}
import json, pathlib, sys
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
model = json.loads(value("--model_args"))["model"]
out = pathlib.Path(value("--output_path")) / "m"
out.mkdir(parents=True)
for task in value("--tasks").split(","):
    rows = pathlib.Path(value("--include_path"), task.removeprefix("sluice_") + ".jsonl").read_text().splitlines()
    right = [1.0 if model.endswith(":dense") or index % 2 else 0.0 for index in range(len(rows))]
    lines = [json.dumps(dict(doc_id=index, exact_match=one)) for index, one in enumerate(right)]
    (out / f"samples_{{task}}_2026.jsonl").write_text("\\n".join(lines))
"""


@dataclass(frozen=True)
class Bench:
    """A home with variants of `m`."""

    home: Home
    output: Path

    def put_interpreter(self, environment: Environment, script: str) -> None:
        python = self.home.environment(environment.name) / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(script.format(python=sys.executable, root=str(ROOT), refusal=REFUSAL))
        python.chmod(0o755)
        stamp = python.parents[1] / STAMP
        stamp.write_text(Installer.of_this_machine().fingerprint(environment))

    def put_variant(self, name: str, *, weights_bytes: int | None = None, model: str = "m") -> Path:
        directory = self.home.checkpoint("m", name)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        header = json.dumps({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        size = (directory / "model.safetensors").stat().st_size if weights_bytes is None else weights_bytes
        Manifest(
            model=model, variant=name, base="b", recipe=name, weights_bytes=size, parameters_count=4
        ).write(directory)  # fmt: skip
        return directory

    def card(self, name: str) -> Card | None:
        return Manifest.read(self.home.checkpoint("m", name)).card

    def evaluate(self, *options: str) -> tuple[int, str]:
        """Exit code and output."""
        home = ["--home", str(self.home.root), "--output", str(self.output)]
        command = [sys.executable, "-m", "app", "evaluate", "m", *home, "--engine", "cpu", *options]
        with Process(command, dict(os.environ)) as process:
            return process.wait(DONE_S), process.output


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(Home(tmp_path / "home"), tmp_path / "page")
    bench.put_interpreter(WORKER_CPU, ENGINE)
    bench.put_interpreter(RECIPES, DIVERGENCE)
    bench.put_interpreter(HARNESS, HARNESS_ANSWERS)
    bench.put_variant("dense")
    return bench


def test_every_variant_gets_its_card_and_the_page_compares_them(bench: Bench) -> None:
    bench.put_variant("w8a8")
    status, output = bench.evaluate("--items", "4")
    assert status == 0, output
    dense, small = bench.card("dense"), bench.card("w8a8")
    assert dense is not None
    assert small is not None
    assert dense.relative_quality == 1.0
    assert dense.uncertainty == ()
    assert small.quality is not None
    assert small.quality.kl_nats_per_token.value == 0.1
    assert {name: (task.score.value, task.dense) for name, task in small.quality.tasks.items()} == dict.fromkeys(
        ("knowledge", "retrieval", "arithmetic"), (0.5, 1.0)
    )
    assert [speed.streams for speed in small.speed] == [1, 8]
    assert all(speed.tokens_per_s > 0 for speed in small.speed)
    assert {one.items for one in small.uncertainty} == {12}
    assert small.memory_bytes
    assert small.machine
    assert small.machine.engine_version != "unknown"
    assert small.gate
    assert small.gate.passed
    assert "`w8a8`" in (bench.output / "variants.md").read_text()
    picture = (bench.output / "variants.svg").read_text()
    assert "w8a8" in picture
    assert picture in (bench.output / "variants.html").read_text()


def test_the_same_seed_gives_the_same_quality(bench: Bench) -> None:
    bench.put_variant("w8a8")
    found = []
    for seed in ("3", "3", "4"):
        assert bench.evaluate("--only", "quality", "--items", "5", "--seed", seed)[0] == 0
        card = bench.card("w8a8")
        assert card is not None
        found.append((card.quality, card.uncertainty, card.seed))
    assert found[0] == found[1] != found[2]


def test_measuring_speed_anew_keeps_the_quality(bench: Bench) -> None:
    bench.put_variant("w8a8")
    assert bench.evaluate("--only", "quality", "--items", "0")[0] == 0
    before = bench.card("w8a8")
    assert bench.evaluate("--only", "speed", "--seed", "9")[0] == 0
    after = bench.card("w8a8")
    assert before is not None
    assert after is not None
    assert before.speed == ()
    assert len(after.speed) == 2
    assert (after.quality, after.seed) == (before.quality, 1)


def test_the_speed_of_one_variant_needs_no_other(bench: Bench) -> None:
    bench.put_variant("w8a8")
    assert bench.evaluate("--only", "quality", "--items", "0")[0] == 0
    dense = bench.card("dense")
    assert bench.evaluate("--only", "speed", "--variants", "w8a8")[0] == 0
    small = bench.card("w8a8")
    assert small is not None
    assert len(small.speed) == 2
    assert bench.card("dense") == dense
    assert "`w8a8`" in (bench.output / "variants.md").read_text()


def test_what_the_engine_refuses_has_its_words_and_the_others_are_measured(bench: Bench) -> None:
    bench.put_variant("refused")
    bench.put_variant("unreadable")
    status, output = bench.evaluate("--items", "0")
    assert status == 0, output
    refused, unreadable = bench.card("refused"), bench.card("unreadable")
    assert refused is not None
    assert unreadable is not None
    assert refused.reason == REFUSAL
    assert refused.quality is not None
    assert refused.speed == ()
    assert unreadable.reason == "KeyError: what is this?"
    assert unreadable.quality is None
    assert len(unreadable.speed) == 2
    assert f"- `refused`: {REFUSAL}" in (bench.output / "variants.md").read_text()


def test_a_page_needs_no_measurement(bench: Bench) -> None:
    dense = Manifest.read(bench.home.checkpoint("m", "dense"))
    assert bench.evaluate("--report") == (
        2,
        "error: m:dense has no card yet: `sluice evaluate` without --report first",
    )
    dense.model_copy(update={"card": card(quality(1.0))}).write(bench.home.checkpoint("m", "dense"))
    status, output = bench.evaluate("--report")
    assert (status, output) == (0, str(bench.output / "variants.md"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variants", "nope"), "no variant 'nope'; there are: dense"),
        (("--texts", "/nowhere.jsonl"), "--texts /nowhere.jsonl: No such file or directory"),
        (("--texts", "pyproject.toml"), "expected JSON Lines"),
        (("--config", "/nowhere.yaml"), "/nowhere.yaml: No such file or directory"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(bench: Bench, options: tuple[str, ...], message: str) -> None:
    status, output = bench.evaluate(*options)
    assert status == 2
    assert output.startswith("error: ")
    assert message in output
    assert "\n" not in output


def test_without_a_dense_sibling_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    bench = Bench(Home(tmp_path / "home"), tmp_path / "page")
    assert "no variants with a manifest" in bench.evaluate()[1]
    bench.put_variant("w8a8")
    status, output = bench.evaluate()
    assert status == 2
    assert "no variant 'dense' there to compare with" in output


def test_a_manifest_of_other_weights_is_refused(bench: Bench) -> None:
    bench.put_variant("w8a8", weights_bytes=7)
    status, output = bench.evaluate()
    assert status == 2
    assert "sluice.json does not match its weights: it says 7 bytes" in output


def test_a_manifest_of_another_model_is_refused(bench: Bench) -> None:
    bench.put_variant("w8a8", model="other")
    status, output = bench.evaluate()
    assert status == 2
    assert "of the model 'other', not of 'm'" in output


@pytest.mark.asyncio
async def test_the_gateway_shows_cards_and_keeps_reasons_to_itself(tmp_path: Path) -> None:
    shown = card(quality(0.9), reason="in /home/somebody: broken")
    Manifest(
        model="m", variant="v", base="b", recipe="r", weights_bytes=1, parameters_count=1, card=shown
    ).write(tmp_path)  # fmt: skip
    worker = {"url": f"http://127.0.0.1:{free_port()}"}
    variants = [{"name": "v", "manifest": str(tmp_path / "sluice.json"), "workers": [worker]}]
    async with GatewayProcess(tmp_path, [{"name": "m", "variants": variants}]) as gateway:
        answer = (await gateway.http.get("/v1/models/m:v")).json()
    assert answer["card"]["quality"]["relative"] == {"value": 0.9, "low": 0.9, "high": 0.9}
    assert answer["card"]["size_bytes"] == 1000
    assert "reason" not in answer["card"]
    assert "machine" not in answer["card"]
