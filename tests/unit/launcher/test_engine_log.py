"""The telling line, in what vLLM really writes when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.launcher.engine_log import TAIL_BYTES, last_lines, plain, read_tail, telling_line

WORKER = "\x1b[0;36m(Worker pid=12)\x1b[0;0m ERROR 11-21 09:29:25 [multiproc_executor.py:953] "
ENGINE = "(EngineCore pid=9) ERROR 11-21 09:29:27 [core.py:1510] "

NO_KERNEL = [
    "(APIServer pid=3) INFO 11-21 09:29:01 [model.py:733] Resolved architecture: LlamaForCausalLM",
    f"{WORKER}Traceback (most recent call last):",
    f'{WORKER}  File "kernels.py", line 3, in choose',
    f"{WORKER}    raise ValueError(reasons)",
    f"{WORKER}ValueError: Failed to find a kernel that can implement the WNA16 linear layer. Reasons: ",
    f"{WORKER} CPUWNA16LinearKernel cannot implement due to: Quant type (uint8b128) not supported",
    f"{ENGINE}Exception: WorkerProc initialization failed due to an exception in a background process.",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            NO_KERNEL,
            (
                "ValueError: Failed to find a kernel that can implement the WNA16 linear layer. Reasons: "
                "CPUWNA16LinearKernel cannot implement due to: Quant type (uint8b128) not supported"
            ),
        ),
        (
            [
                "INFO:     Application startup complete.",
                f"{ENGINE}AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'",
                "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)",
            ],
            "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'",
        ),
        (["usage: api_server.py [options]", "api_server.py: error: unrecognized arguments: --nope"],
         "api_server.py: error: unrecognized arguments: --nope"),
        (["vllm.v1.engine.exceptions.EngineDeadError: gone", "bye"],
         "vllm.v1.engine.exceptions.EngineDeadError: gone"),
        (["Killed by the kernel", ""], "Killed by the kernel"),
        (["", "  "], None),
        ([], None),
    ],
)  # fmt: skip
def test_the_root_cause_is_told_not_its_echoes(lines: list[str], expected: str | None) -> None:
    assert telling_line(lines) == expected


def test_last_lines_leave_the_frames_of_tracebacks_out() -> None:
    assert last_lines(NO_KERNEL, count=4) == [
        "ValueError: Failed to find a kernel that can implement the WNA16 linear layer. Reasons:",
        "CPUWNA16LinearKernel cannot implement due to: Quant type (uint8b128) not supported",
        "Exception: WorkerProc initialization failed due to an exception in a background process.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
    ]


def test_a_line_of_any_length_is_shown_in_part() -> None:
    assert len(plain("x" * 100_000)) < 1000


def test_what_was_written_before_the_start_is_not_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: of an earlier run\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("fine\n")
    assert read_tail(log, start) == ["fine"]


def test_a_log_that_was_cut_short_is_read_from_its_beginning(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("short\n")
    assert read_tail(log, start=1_000_000) == ["short"]


def test_only_the_end_of_a_large_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a line\n" * TAIL_BYTES)
    assert sum(len(line) + 1 for line in read_tail(log)) <= TAIL_BYTES


def test_a_log_that_does_not_exist_has_no_lines(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "none") == []
