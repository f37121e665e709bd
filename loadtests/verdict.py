"""The verdict in words: which backend, up to which length, at what rate, and what is lost. One sentence a fact."""

from __future__ import annotations

from dataclasses import dataclass

from loadtests.analysis import Analysis, Blocking, Crossing, Leak, longest_good
from loadtests.measures import quantile
from loadtests.quality import Quality
from loadtests.result import Report
from loadtests.statistics import Interval

CERTAIN = 0.95


@dataclass(frozen=True)
class Verdict:
    """A headline, what supports it, and whether the figures may be believed."""

    headline: str
    facts: list[str]
    validity: str  # VALID, INVALID or INTERRUPTED
    standing: str  # what that means
    doubts: list[str]


def verdict(report: Report, found: Analysis, quality: Quality | None) -> Verdict:
    """Say what a report says."""
    facts: list[str] = {"sweep": _sweep, "capacity": _capacity, "mixed": _mixed, "soak": _soak}[report.kind](report, found)
    facts += _losses(report, found, quality)
    headline, *rest = facts or ["No request was answered" if report.blocks else "Nothing was measured"]
    return Verdict(headline, rest, *_validity(report), doubts(report, found))


def _validity(report: Report) -> tuple[str, str]:
    if report.interrupted:
        return "INTERRUPTED", "the run did not come to its end; what follows was measured until then"
    if report.valid:
        return "VALID", "the generator kept its schedule in every block, and the server counted what it sent"
    return "INVALID", "do not cite these figures: in some blocks a condition they rest on did not hold"


def doubts(report: Report, found: Analysis) -> list[str]:
    """Everything that speaks against taking the figures at their word."""
    told = _failed_gates(report)
    told += _failed_requests(found)
    for row in found.rows:
        if row.clipped_share:
            told.append(f"{row.cell.told}: {row.clipped_share:.0%} of the lengths were clipped to what the server takes")
        if row.tokens_off:
            told.append(f"{row.cell.told}: {row.tokens_off} answers tell another number of input tokens than was cut")
    if not any(block.server for block in report.blocks):
        told.append("the server has no metrics this tool can read, so nobody but the client counted the requests")
    if "estimate" in report.tokens_by:
        told.append("the server has no /tokenize, so input lengths are estimated by characters")
    return told + list(report.notes)


def _failed_gates(report: Report) -> list[str]:
    """Each kind of gate that failed: in how many blocks, and what the first of them said."""
    failed: dict[str, list[str]] = {}
    for block, gate in report.failed_gates:
        failed.setdefault(gate.name, []).append(f"{gate.told} ({block.cell.told}, repeat {block.repeat + 1})")
    count = len(report.blocks)
    return [f"not {name} in {len(each)} of {count} blocks; the first: {each[0]}" for name, each in failed.items()]


def _failed_requests(found: Analysis) -> list[str]:
    """Each way in which requests failed: how many did, in which cells."""
    told = []
    for outcome in sorted({name for row in found.rows for name in row.outcomes if name != "ok"}):
        rows = [row for row in found.rows if row.outcomes.get(outcome)]
        count, of = sum(row.outcomes[outcome] for row in rows), sum(row.count for row in rows)
        cells = rows[0].cell.told if len(rows) == 1 else f"{len(rows)} of {len(found.rows)} cells"
        told.append(f"{outcome.replace('_', ' ')}: {count} of {of} requests in {cells}")
    return told


def _name(backend: str, report: Report) -> str:
    return backend or report.model


def _sweep(report: Report, found: Analysis) -> list[str]:
    load = found.loads[0] if found.loads else ""
    crossings = [each for each in found.crossings if each.load == load]
    facts = [_choice(crossings, load)] if crossings else []
    facts += [_crossing(each) for each in crossings]
    if not crossings:
        for backend in found.backends:
            for row in found.rows_of(backend, load)[-1:]:
                assert row.median is not None, "rows_of gives answered rows"
                facts.append(
                    f"{_name(backend, report)} answers {row.cell.tokens:,} tokens in {seconds(row.median.value)} ({load})"
                )
    return facts + _rates(report, found) + _bytes(report, found, load) + _levels(report, found, load)


def _choice(crossings: list[Crossing], load: str) -> str:
    """The answer to which backend is the fastest, in one sentence."""
    best = max(crossings, key=lambda each: each.ratio.value)
    first, second = best.first, best.second
    if best.ratio.low <= 1:
        return f"Nothing measured is faster than {first} for good, up to {best.longest:,} tokens ({load})"
    end = f"{_faster(best.ratio.value)} at {best.longest:,} tokens"
    if best.at.tokens is None:
        return f"{second} answers faster than {first} at every length, {end}"
    return (
        f"Up to about {_rounded(best.at.tokens.value)} tokens {first} answers as fast as any; beyond, {second} is faster, {end}"
    )


def _faster(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio >= 2 else f"by {ratio - 1:.0%}"


def _levels(report: Report, found: Analysis, load: str) -> list[str]:
    level = report.scenario.get("service_level")
    if not level or not found.backends:
        return []
    longest = [(backend, longest_good(found, backend, load, level["attainment"])) for backend in found.backends]
    if len({tokens for _, tokens in longest}) == 1 and (tokens := longest[0][1]):
        return [f"The service level is kept up to {tokens:,} tokens by every backend ({load})"]
    told = ", ".join(
        f"{_name(backend, report)} " + (f"{tokens:,} tokens" if tokens else "no length") for backend, tokens in longest
    )
    return [f"The service level is kept up to: {told} ({load})"]


def _crossing(crossing: Crossing) -> str:
    first, second, at = crossing.first, crossing.second, crossing.at
    end = f"at {crossing.longest:,} tokens it takes {_times(crossing.ratio)}"
    if at.tokens is not None:
        return f"{second} is faster than {first} from {_range(at.tokens)} tokens on; {end}"
    if at.always:
        return f"{second} is faster than {first} at every length measured; {end}"
    sure = "" if at.certainty >= CERTAIN else f" (in {at.certainty:.0%} of resamples)"
    return f"{second} is not faster than {first} at any length measured{sure}; {end}"


def _times(ratio: Interval) -> str:
    """What a first over second ratio says about the second's time."""
    if not ratio.excludes_one:
        return f"as long, as far as can be told ({1 / ratio.high:.2f} to {1 / ratio.low:.2f} times)"
    return f"{1 / ratio.value:.2f} times as long" if ratio.value < 1 else f"{percent(1 / ratio.value)} of the time"


def _range(interval: Interval) -> str:
    return f"{_rounded(interval.value)} ({_rounded(interval.low)} to {_rounded(interval.high)})"


def _rounded(tokens: float) -> str:
    return f"{float(f'{tokens:.2g}'):,.0f}"


def _longest(found: Analysis) -> int | None:
    """The longest length at which every backend answered."""
    lengths = [{row.cell.tokens for row in found.rows if row.cell.backend == each and row.ok} for each in found.backends]
    shared = set.intersection(*lengths) - {None} if lengths else set()
    return max((tokens for tokens in shared if tokens), default=None)


def _rates(report: Report, found: Analysis) -> list[str]:
    """The most requests a second that were answered at the longest length, under any load."""
    if (longest := _longest(found)) is None:
        return []
    best = []
    for backend in found.backends:
        rates = [r.requests_per_second for r in found.rows if (r.cell.backend, r.cell.tokens) == (backend, longest)]
        best.append(f"{_name(backend, report)} {max(rates):.2g}")
    return [f"Requests of {longest:,} tokens answered in a second, at most: {', '.join(best)}"]


def _bytes(report: Report, found: Analysis, load: str) -> list[str]:
    longest = _longest(found)
    rows = [row for backend in found.backends for row in found.rows_of(backend, load) if row.cell.tokens == longest]
    told = [f"{_name(row.cell.backend, report)} {mebibytes(row.reserved_bytes)}" for row in rows if row.reserved_bytes]
    return [f"One request of {longest:,} tokens reserves: {', '.join(told)}"] if told else []


def _capacity(report: Report, found: Analysis) -> list[str]:
    level = report.scenario["service_level"]
    told = []
    for search in sorted(report.searches, key=lambda each: (each.cell.backend, each.cell.tokens or 0)):
        length = f"{search.cell.tokens:,} tokens" if search.cell.tokens else search.cell.length
        name = f"{_name(search.cell.backend, report)}, {length}"
        doubt = "" if all(probe.decided for probe in search.probes) else " (one probe or more was undecided)"
        rate = "no rate tried" if search.rate is None else f"{search.rate:.3g} requests a second"
        told.append(
            f"{name}: {rate} keep{'s' if search.rate is None else ''} {level['attainment']:.0%} within the service level{doubt}"
        )
    return told


def _mixed(report: Report, found: Analysis) -> list[str]:
    if not found.blockings:
        return []
    times = ", ".join(f"{each.ratio.value:.1f} times ({_name(each.backend, report)})" for each in found.blockings)
    head = f"Beside the others, {found.blockings[0].alone.stream} requests take as long as alone: {times}"
    return [head, *(_blocking(each, _name(each.backend, report)) for each in found.blockings)]


def _blocking(each: Blocking, name: str) -> str:
    assert each.alone.median and each.together.median
    tails = [seconds(quantile(row.latency, 0.95)) for row in (each.alone, each.together)]
    return (
        f"Under {name} the {each.alone.stream} requests take {seconds(each.together.median.value)} beside the others and "
        f"{seconds(each.alone.median.value)} alone ({each.ratio.value:.1f} times, "
        f"{each.ratio.low:.1f} to {each.ratio.high:.1f}); p95 {tails[1]} against {tails[0]}"
    )


def _soak(report: Report, found: Analysis) -> list[str]:
    return [_leak(each, _name(each.backend, report)) for each in found.leaks]


def _leak(leak: Leak, name: str) -> str:
    low, value, high = (
        mebibytes(each) for each in (leak.bytes_per_hour.low, leak.bytes_per_hour.value, leak.bytes_per_hour.high)
    )
    if leak.bytes_per_hour.low > 0:
        return (
            f"Under {name} the server's memory grows by {value} an hour ({low} to {high}), over {leak.seconds / 60:.0f} minutes"
        )
    told = f"as far as {leak.seconds / 60:.0f} minutes tell ({low} to {high} an hour)"
    return f"Under {name} the server's memory does not grow, {told}"


def _losses(report: Report, found: Analysis, quality: Quality | None) -> list[str]:
    """What the other backends lose against the first, at the longest length that both were measured at."""
    if quality is None or report.kind not in ("sweep", "capacity"):
        return []
    told = []
    known = [name for name in found.backends if name in quality.bits_per_byte]
    longest = max((row.cell.tokens or 0 for row in found.rows), default=0)
    for name in known[1:]:
        shared = [n for n in quality.bits_per_byte[name] if n in quality.bits_per_byte[known[0]] and n <= longest]
        if shared:
            told.append(_loss(quality, known[0], name, max(shared)))
    return told


def _loss(quality: Quality, first: str, name: str, tokens: int) -> str:
    bits = quality.bits_per_byte[name][tokens] / quality.bits_per_byte[first][tokens] - 1
    text = f"{name} needs {abs(bits):.1%} {'more' if bits > 0 else 'fewer'} bits per byte than {first} at {tokens:,} tokens"
    needles = [quality.needle_recall.get(each, {}).get(tokens) for each in (name, first)]
    if None not in needles:
        text += f" and finds {needles[0]:.0%} of the needles, {first} {needles[1]:.0%}"
    return text


def seconds(value: float | None) -> str:
    """A duration with its unit."""
    if value is None:
        return "-"
    if value < 0.0995:
        return f"{value * 1e3:.2g} ms" if value < 0.00995 else f"{value * 1e3:.0f} ms"
    return f"{value * 1e3:.0f} ms" if value < 0.9995 else f"{value:.2f} s" if value < 99.5 else f"{value:.0f} s"


def percent(share: float) -> str:
    """A share with two digits that count."""
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def span(interval: Interval) -> str:
    """An interval of durations, its unit once where both ends have the same."""
    low, high = seconds(interval.low), seconds(interval.high)
    return f"{low.split()[0]} to {high}" if low.split()[1:] == high.split()[1:] else f"{low} to {high}"


def mebibytes(value: float | None) -> str:
    """Bytes in MiB."""
    if value is None:
        return "-"
    size = value / 2**20
    return f"{size:.2g} MiB" if abs(size) < 9.95 else f"{size:,.0f} MiB"
