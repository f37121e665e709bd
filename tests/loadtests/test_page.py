"""The page says what was measured, stands on its own, and can be read at any width, in light and dark."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from loadtests import outputs, page, quality
from loadtests.analysis import Analysis, analyse
from loadtests.faults import ScenarioError
from loadtests.quality import Quality
from loadtests.result import Report
from loadtests.verdict import mebibytes, seconds, verdict
from tests.loadtests.browser import look, needs_chromium
from tests.loadtests.samples import report_of

CARD = Path("service/model/embedded/README.md")
KINDS = ("sweep", "capacity", "mixed", "soak")


@pytest.fixture(scope="module")
def card() -> Quality:
    return quality.read(CARD)


@functools.cache
def sample(kind: str, failing: bool = False) -> tuple[Report, Analysis]:
    report = report_of(kind, failing=failing)
    return report, analyse(report)


@functools.cache
def written(kind: str, failing: bool = False) -> str:
    """The page of a sample."""
    return page.render(*sample(kind, failing), quality.read(CARD))


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_on_a_sweep_s_page_overlaps_is_cut_off_or_faint(dark: bool) -> None:
    seen = look(written("sweep", failing=True), dark)
    assert [each for width in seen for each in width["found"]] == []
    assert [width["svgs"] for width in seen] == [4, 4] and all(width["texts"] > 200 for width in seen)
    assert all((width["paper"] < 0.05) == dark for width in seen)


@needs_chromium
@pytest.mark.parametrize("kind", KINDS[1:])
def test_nothing_on_the_other_pages_overlaps_is_cut_off_or_faint(kind: str) -> None:
    assert [each for width in look(written(kind)) for each in width["found"]] == []


@needs_chromium
def test_a_page_with_an_overlap_is_found_out() -> None:
    """The check itself: a line too wide, two texts in one place, one hardly to be read."""
    wrong = written("soak").replace(
        "</body>",
        "<p style='width:3000px;white-space:nowrap'>wide</p><p style='position:absolute;left:0;top:0'>one</p>"
        "<p style='position:absolute;left:0;top:0;color:#999'>another</p></body>",
    )
    kinds = {what for width in look(wrong) for _, what, *_ in width["found"]}
    assert {"wider than the page", "overlap", "faint"} <= kinds


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_needs_nothing_but_itself(kind: str) -> None:
    text = written(kind)
    assert not re.search(r"<script|<link|@import|url\((?!#)|src=", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://127.0.0.1:8000,",
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_same_file_gives_the_same_page(card: Quality) -> None:
    report = Report.model_validate_json(sample("mixed")[0].model_dump_json())
    assert page.render(report, analyse(report), card) == written("mixed")


def test_what_a_server_said_is_shown_as_text_and_never_as_markup() -> None:
    report, _ = sample("mixed", failing=True)
    text = report.model_dump_json().replace("500: internal error", "<img src=x onerror=alert(1)>")
    report = Report.model_validate_json(text)
    text = page.render(report, analyse(report), None)
    assert "<img" not in text and "&lt;img" in text


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("sweep", ["Up to about 3,", "tokens dense answers as fast as any", "16,384", "needles", "reserves"]),
        ("capacity", ["requests a second keep 95% within the service level", "undecided"]),
        ("mixed", ["Beside the others, short requests take as long as alone: 4.0 times (dense)", "p95"]),
        ("soak", ["the server's memory grows by", "an hour"]),
    ],
)
def test_the_verdict_answers_the_question_of_its_kind(kind: str, told: list[str], card: Quality) -> None:
    found = verdict(*sample(kind), card)
    text = ". ".join((found.headline, *found.facts))
    assert [each for each in told if each not in text] == []
    assert found.validity == "VALID"


def test_a_failed_gate_and_a_failed_request_are_in_the_verdict() -> None:
    found = verdict(*sample("sweep", failing=True), None)
    assert found.validity == "INVALID"
    assert any("not sent on time in 36 of 108 blocks" in each for each in found.doubts)
    assert any("server error: 108 of" in each and "36 of 36 cells" in each for each in found.doubts)


def test_a_single_model_without_backends_has_a_page_too() -> None:
    report = report_of("sweep", backends=())
    text = page.render(report, analyse(report), None)
    assert "longserve-stdlib-5m answers 16,384 tokens in" in text


def test_a_report_without_one_answer_says_so() -> None:
    empty = {"blocks": (), "interrupted": True, "notes": ("the server stopped answering",)}
    report = sample("sweep")[0].model_copy(update=empty)
    text = page.render(report, analyse(report), None)
    assert "Nothing was measured" in text and "INTERRUPTED" in text and "the server stopped answering" in text


def test_the_readme_s_table_holds_the_report_s_medians_and_the_card_s_quality(card: Quality) -> None:
    report, found = sample("sweep")
    head, _, dense, *_ = outputs.markdown(report, card).splitlines()
    rows = {row.cell.tokens: row for row in found.rows_of("dense", "1 in flight")}
    assert rows[16384].median is not None
    assert seconds(rows[16384].median.value) in dense and mebibytes(rows[16384].reserved_bytes) in dense
    assert head.count("|") == dense.count("|") and f"{card.bits_per_byte['dense'][16384]:.2f}" in dense


def test_the_readme_s_plot_follows_light_and_dark_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "plot.svg"
    outputs.write_plot(sample("sweep")[0], path)
    text = path.read_text()
    assert text.startswith("<svg") and "prefers-color-scheme:dark" in text and "sliding_window" in text


def test_the_model_card_s_tables_are_read_as_they_stand(card: Quality) -> None:
    assert card.bits_per_byte["dense"][2048] == pytest.approx(0.779)
    assert card.needle_recall["performer"] == {1024: 1.0, 2048: 0.4, 4096: 0.2, 8192: 0.16, 16384: 0.0, 32768: 0.0}
    assert card.needle_recall["layered"][16384] == pytest.approx(0.84)  # of another table of this title
    with pytest.raises(ScenarioError, match="no table titled"):
        quality.read(Path("README.md"))


DURATIONS = {0.00123: "1.2 ms", 0.0123: "12 ms", 0.4567: "457 ms", 0.9996: "1.00 s", 6.626: "6.63 s", 123.4: "123 s"}


@pytest.mark.parametrize(("value", "told"), DURATIONS.items())
def test_durations_have_their_unit(value: float, told: str) -> None:
    assert seconds(value) == told
