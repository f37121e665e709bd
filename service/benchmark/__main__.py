"""python -m service.benchmark: the bare model, the engine alone, the service over HTTP, in one run; proxies, encoders by name.

Prints a table for people, the machine beneath, and one last line of JSON for programs. About five minutes on two cores;
`--quick` leaves out 32k tokens and HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import uvloop

from service.benchmark.again import measure_again
from service.benchmark.alone import measure_engine
from service.benchmark.auto import measure_auto
from service.benchmark.bare import measure_bare, report
from service.benchmark.beside import measure_beside
from service.benchmark.encoder import measure_encoder
from service.benchmark.fewer import measure_weights
from service.benchmark.long import measure_long
from service.benchmark.peak import memory_trial
from service.benchmark.prefix import measure_prefix
from service.benchmark.proxies import measure_proxies
from service.benchmark.served import measure_http
from service.benchmark.shared import measure_shared
from service.benchmark.speculation import measure_speculation
from service.benchmark.step import measure_step
from service.benchmark.streams import measure_streams
from service.benchmark.together import SHAPES, measure_together
from service.machine import BESIDE_BUDGET_BYTES
from service.threads import in_passing_thread

PARTS = ("bare", "engine", "auto", "prefix", "memory", "http", "proxies", "encoder", "long", "again", "speculation", "streams")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m service.benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one repeat, up to 16k tokens, by default without HTTP")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="which parts to run")
    parser.add_argument("--encoder", metavar="DIR", help="the checkpoint of part encoder, by default all-MiniLM-L6-v2")
    parser.add_argument(
        "--profile-step",
        nargs="?",
        const="embedded",
        choices=tuple(SHAPES),
        help="where the time of a decode step goes, of the embedded model unless told, and nothing else",
    )
    parser.add_argument("--shared", action="store_true", help="the engine beside busy processes, and nothing else")
    parser.add_argument(
        "--weights",
        nargs="*",
        type=int,
        metavar="TOKENS",
        help="a 0.6B decoder by its weights' bits, beside llama.cpp, and nothing else",
    )
    parser.add_argument(
        "--beside",
        nargs="*",
        type=int,
        metavar="TOKENS",
        help="decode steps of the embedded shape beside llama.cpp, and nothing else",
    )
    parser.add_argument(
        "--together",
        nargs="*",
        type=int,
        metavar="TEXTS",
        help="decode steps of many texts at once beside llama.cpp, and nothing else",
    )
    parser.add_argument("--heads", nargs="+", type=int, default=[2, 4], metavar="N", help="key-value heads of --beside")
    options = parser.parse_args()
    lengths = [16_384] if options.quick else [16_384, 32_768]
    repeats = 1 if options.quick else 2
    by_name = (options.profile_step, options.weights, options.beside, options.together)
    is_alone = options.shared or any(each is not None for each in by_name)
    parts = () if is_alone else options.parts or PARTS[: 5 if options.quick else 6]
    random.seed(0)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # the loop that Ray gives its replicas
    result: dict[str, Any] = {"prefill_ratio": {}} if parts else {}
    if options.profile_step:
        result["step_us"] = measure_step([1024, 4096, *lengths], options.profile_step)
    if options.weights is not None:
        result["weights"] = in_passing_thread(lambda: measure_weights(options.weights or [1024, 4096]))
    if options.beside is not None:
        result["beside"] = in_passing_thread(lambda: measure_beside(options.beside or [1024, 4096, *lengths], options.heads))
    if options.together is not None:
        result["together"] = in_passing_thread(lambda: measure_together(options.together or [2, 8, 32, 64]))
    if options.shared:
        result["shared"] = asyncio.run(measure_shared())
    if "bare" in parts:
        in_passing_thread(lambda: measure_bare([1024, 4096, *lengths]))
    if "engine" in parts:
        found = asyncio.run(measure_engine(lengths, repeats))
        result["prefill_ratio"]["engine"] = found.pop("prefill_ratio")
        result |= found
    if "auto" in parts:
        result["auto"] = asyncio.run(measure_auto([512, 2048, 8192, *lengths]))
    if "prefix" in parts:
        result["prefix"] = asyncio.run(measure_prefix())
    if "memory" in parts:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            result["peak_over_budget_bytes"] = fresh.submit(memory_trial).result()
        told = f"{result['peak_over_budget_bytes'] / 2**20:.1f} MiB, {BESIDE_BUDGET_BYTES / 2**20:.0f} are stated"
        report("memory, peak over budget, weights and runtime", "all", told)
    if "http" in parts:
        found = measure_http(lengths, repeats)
        result["prefill_ratio"]["http"] = found["prefill_ratio"]
        result["overhead_ms"] = found["overhead_ms"]
    if "proxies" in parts:
        result["proxies"] = measure_proxies()
    if "encoder" in parts:
        result["encoder"] = measure_encoder(options.encoder)
    if "long" in parts:
        result["long"] = measure_long()
    if "again" in parts:
        result["again"] = asyncio.run(measure_again([512, 2048, 8192]))
    if "speculation" in parts:
        result["speculation"] = asyncio.run(measure_speculation())
    if "streams" in parts:
        result["streams"] = measure_streams()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
