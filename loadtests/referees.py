"""python -m loadtests.referees: the same cell by this tool, by guidellm and by AIPerf, in turn.

Each referee lives in an environment of its own, for they pin other versions of what this one uses:

    python3.11 -m venv GUIDELLM && GUIDELLM/bin/pip install guidellm==0.8.1
    python3.11 -m venv AIPERF && AIPERF/bin/pip install aiperf==0.13.0
    python -m loadtests.referees --url http://127.0.0.1:8000 --tokenizer service/model/embedded \
        --guidellm GUIDELLM/bin/guidellm --aiperf AIPERF/bin/aiperf

The cell is that of scenarios/referee.yaml: streamed completions at a constant rate. Prints medians, rates and their ratios;
exit status 1 where a median differs by more than 10% or a rate by more than 2%.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import measures, result, scenario
from loadtests.scenario import Constant, FixedLength, Sweep

SCENARIO = Path(__file__).with_name("scenarios") / "referee.yaml"
MEDIAN_TOLERANCE, RATE_TOLERANCE = 0.10, 0.02


@dataclass(frozen=True)
class Cell:
    """What every tool is asked for."""

    url: str
    model: str
    tokenizer: Path
    tokens: int
    output: int
    rate: float
    count: int


@dataclass(frozen=True)
class Answer:
    """What one tool says: medians in seconds, and the requests a second it sent or saw answered."""

    latency: float
    first_token: float
    rate: float


def ours(cell: Cell, folder: Path) -> Answer:
    """This tool, one repeat."""
    command = [sys.executable, "-m", "loadtests", "sweep", str(SCENARIO), "--url", cell.url, "--model", cell.model]
    subprocess.run([*command, "--repeats", "1", "--out", str(folder)], check=False, stdout=subprocess.DEVNULL)
    (path,) = folder.glob("*/report.json")
    (block,) = result.load(path).blocks
    stream = block.streams["requests"]
    assert stream.ok == stream.count, f"{stream.count - stream.ok} requests failed: {stream.failures}"
    medians = [measures.quantile(each.values(), 0.5) or 0.0 for each in (stream.latency_from_send, stream.first_token)]
    return Answer(medians[0], medians[1], (stream.count - 1) / stream.sent_seconds)


def guidellm(program: Path) -> Callable[[Cell, Path], Answer]:
    """guidellm 0.8."""

    def run(cell: Cell, folder: Path) -> Answer:
        out = folder / "guidellm.json"
        backend = f"kind=openai_http,target={cell.url},model={cell.model},request_format=/v1/completions"
        data = f"kind=synthetic_text,prompt_tokens={cell.tokens},output_tokens={cell.output}"
        _call(
            [
                program,
                "run",
                "--backend",
                backend,
                "--tokenizer",
                f"kind=huggingface_auto,model={cell.tokenizer}",
                "--data",
                data,
            ],
            ["--profile", f"kind=constant,rate={cell.rate:g}", "--constraint", f"kind=max_requests,count={cell.count}"],
            ["--seed", "kind=static,value=42", "--disable-console-interactive", "--output", f"kind=json,path={out}"],
            offline=True,
        )
        found = json.loads(out.read_text())["benchmarks"][0]["metrics"]
        latency = found["request_latency"]["successful"]["median"]
        first = found["time_to_first_token_ms"]["successful"]["median"] / 1e3
        return Answer(latency, first, found["requests_per_second"]["successful"]["mean"])

    return run


def aiperf(program: Path) -> Callable[[Cell, Path], Answer]:
    """AIPerf 0.13."""

    def run(cell: Cell, folder: Path) -> Answer:
        _call(
            [program, "profile", "--model", cell.model, "--url", cell.url, "--endpoint-type", "completions", "--streaming"],
            ["--tokenizer", cell.tokenizer, "--use-server-token-count", "--isl", cell.tokens, "--isl-stddev", "0"],
            [
                "--osl",
                cell.output,
                "--osl-stddev",
                "0",
                "--extra-inputs",
                "ignore_eos:true",
                "--request-rate",
                f"{cell.rate:g}",
            ],
            ["--arrival-pattern", "constant", "--request-count", cell.count, "--warmup-request-count", "3"],
            [
                "--random-seed",
                "42",
                "--no-gpu-telemetry",
                "--workers-max",
                "1",
                "--ui",
                "none",
                "--output-artifact-dir",
                folder,
            ],
            offline=False,  # offline, it takes the tokenizer's directory for the name of one on a hub
        )
        path = min(folder.rglob("profile_export_aiperf.json"), key=lambda each: len(each.parts))
        found: dict[str, Any] = json.loads(path.read_text())
        medians = [found[name]["p50"] / 1e3 for name in ("request_latency", "time_to_first_token")]
        return Answer(medians[0], medians[1], found["request_throughput"]["avg"])

    return run


def _call(*parts: list[Any], offline: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB", "TRANSFORMERS_OFF"))}
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [str(word) for part in parts for word in part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.referees", description="The same cell by several tools.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="longserve-stdlib-5m")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the served model's tokenizer")
    parser.add_argument("--guidellm", type=Path, help="the program")
    parser.add_argument("--aiperf", type=Path, help="the program")
    parser.add_argument("--rounds", type=int, default=3, help="of all tools in turn")
    options = parser.parse_args()
    tools: dict[str, Callable[[Cell, Path], Answer]] = {"loadtests": ours}
    tools |= {"guidellm": guidellm(options.guidellm)} if options.guidellm else {}
    tools |= {"AIPerf": aiperf(options.aiperf)} if options.aiperf else {}
    return _compare(tools, _cell(options), options.rounds)


def _cell(options: argparse.Namespace) -> Cell:
    asked = scenario.read(SCENARIO)
    assert isinstance(asked, Sweep) and isinstance(asked.lengths, FixedLength), "the referees' scenario is one cell"
    (load,) = asked.loads
    assert isinstance(load, Constant), "at a constant rate"
    count = int(load.rate * asked.seconds)
    tokenizer = options.tokenizer.resolve()
    return Cell(options.url, options.model, tokenizer, asked.lengths.tokens, asked.output_tokens, load.rate, count)


def _compare(tools: dict[str, Callable[[Cell, Path], Answer]], cell: Cell, rounds: int) -> int:
    answers: dict[str, list[Answer]] = {name: [] for name in tools}
    for turn in range(rounds):
        for name, tool in tools.items():
            with tempfile.TemporaryDirectory() as folder:
                answer = tool(cell, Path(folder))
            answers[name].append(answer)
            print(f"round {turn + 1}: {name:10s} {_told(answer)}", flush=True)
    middle = {name: _middle(each) for name, each in answers.items()}
    mine, agreed = middle["loadtests"], True
    asked = f"{cell.count} streamed completions of {cell.tokens} and {cell.output} tokens at {cell.rate:g}/s"
    print(f"\n{asked}, medians of {rounds} rounds")
    for name, answer in middle.items():
        ratios = (answer.latency / mine.latency, answer.first_token / mine.first_token, answer.rate / mine.rate)
        agreed &= abs(ratios[0] - 1) <= MEDIAN_TOLERANCE and abs(ratios[2] - 1) <= RATE_TOLERANCE
        print(f"{name:10s} {_told(answer)}; against this tool: {ratios[0]:.3f}, {ratios[1]:.3f}, {ratios[2]:.3f}")
    return 0 if agreed else 1


def _middle(answers: list[Answer]) -> Answer:
    return Answer(*(statistics.median(getattr(a, name) for a in answers) for name in ("latency", "first_token", "rate")))


def _told(answer: Answer) -> str:
    return f"latency {answer.latency * 1e3:.1f} ms, first token {answer.first_token * 1e3:.1f} ms, {answer.rate:.3f} requests/s"


if __name__ == "__main__":
    sys.exit(main())
