"""The page of a run: every statement in place, nothing from elsewhere, nothing unescaped."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flwr_clicooper.provenance.checking import Case
from flwr_clicooper.provenance.evidence import RunEvidence, load_run
from flwr_clicooper.provenance.trust import Party, Trust
from flwr_clicooper.provenance.verify import verify_run
from flwr_clicooper.report.facts import Facts, facts_of
from flwr_clicooper.report.lineage import lineage_html, page_of
from flwr_clicooper.report.svg import count, cut, seconds
from tests.provenance.runs import Attempt, Made

EVIL = "<script>alert('1')</script>&\""


def facts(made: Made, trust: Trust | None = None) -> Facts:
    report = verify_run(made.folder, trust)
    return facts_of(Case(made.folder, load_run(made.folder), trust), report)


def picture(page: str) -> ElementTree.Element:
    """The one picture of a page, as an XML parser reads it."""
    (svg,) = re.findall(r'<svg viewBox=.*?role="img".*?</svg>', page, re.DOTALL)
    return ElementTree.fromstring(svg)


def cells(page: str) -> dict[int, str]:
    """The class of each statement's frame, by its line from 1."""
    found = {}
    for link in picture(page).iter("a"):
        frame = link.find("rect")
        assert frame is not None
        found[int(link.attrib["href"].removeprefix("#line-"))] = frame.attrib["class"]
    return found


def words(page: str) -> list[str]:
    return [element.text or "" for element in picture(page).iter("text")]


@pytest.mark.parametrize(
    ("trainers", "rounds", "attempts"),
    [
        (1, 1, (Attempt(),)),
        (3, 4, (Attempt(), Attempt("7", 2, ("trainer 2",)), Attempt("7", 4))),
        (2, 40, (Attempt(), Attempt("8", 25))),
    ],
)
def test_every_statement_has_a_cell_and_a_row(
    trainers: int, rounds: int, attempts: tuple[Attempt, ...], tmp_path: Path
) -> None:
    made = Made(tmp_path / "7", trainers, rounds, attempts)
    page = page_of(facts(made, made.trust))
    places = set(range(1, len(made.lines) + 1))
    assert set(cells(page)) == places
    assert {int(it) for it in re.findall(r'<tr id="line-(\d+)"', page)} == places
    assert all(kind.endswith(" ok") for kind in cells(page).values())
    assert "The evidence holds" in page


def test_what_failed_is_coloured_and_nothing_else_is(tmp_path: Path) -> None:
    def alter(name: str, it: Any) -> Any:
        return replace(it, steps=3) if name == "round 2.1" else it

    made = Made(tmp_path / "7", 2, 3, alter=alter)
    page = page_of(facts(made))
    wrong = made.index("round 2.1") + 1
    assert {line for line, kind in cells(page).items() if kind == "card bad"} == {wrong}
    assert "The evidence does not hold" in page
    assert "steps and records: 3 steps on 100 records; the job says 7 on 100" in page


def test_all_that_failed_is_coloured_not_only_the_first(tmp_path: Path) -> None:
    def alter(name: str, it: Any) -> Any:
        return replace(it, steps=3) if name in ("round 2.1", "round 3.2") else it

    made = Made(tmp_path / "7", 2, 3, alter=alter)
    wrong = {made.index(name) + 1 for name in ("round 2.1", "round 3.2")}
    found = cells(page_of(facts(made)))
    assert {line for line, kind in found.items() if kind == "card bad"} == wrong


def test_links_that_do_not_hold_are_broken(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", 2, 3)
    held = [it.attrib["class"] for it in picture(page_of(facts(made))).iter("path")]
    assert "arrow broken" not in held
    assert held.count("arrow") == 3 * 2 + 3 + 2 + 2  # in time, between, from and to the owner
    del made.lines[made.index("round 2.1")]
    made.write_lines()
    page = page_of(facts(made))
    broken = [it for it in picture(page).iter("path") if it.attrib["class"] == "arrow broken"]
    assert len(broken) == 2  # round 3 of the segment, and round 2 of the one below
    assert "no statement" in words(page)


def test_hand_overs_retries_and_resumed_runs_are_named(tmp_path: Path) -> None:
    attempts = (Attempt(), Attempt("7", 1), Attempt("7", 2, ("trainer 2",)), Attempt("8", 3))
    made = Made(tmp_path / "7", 2, 4, attempts)
    told = facts(made, made.trust)
    name = told.names[made.jobs[2].party("trainer", 2)]
    assert told.attempts == (
        "begins the run",
        "tried again after round 1",
        f"hand-over after round 2: segment 2 to {name}",
        "resumes run 7 after round 3",
    )
    assert words(page_of(told)).count("hand-over") == 1


def test_parties_with_a_key_per_attempt_are_not_handed_over(tmp_path: Path) -> None:
    new = ("owner", "trainer 1", "trainer 2")
    made = Made(tmp_path / "7", 2, 2, (Attempt(), Attempt("7", 1, new)))
    told = facts(made)
    assert told.attempts[1] == "tried again after round 1; all keys are new"
    assert "hand-over" not in words(page_of(told))


def test_a_run_that_was_not_delivered_says_so(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", 2, 2, delivered=False)
    page = page_of(facts(made))
    assert "not delivered" in words(page)
    assert "Delivery" not in words(page)


def test_without_readable_evidence_there_is_a_page_with_the_checks(tmp_path: Path) -> None:
    page = lineage_html(RunEvidence(()), verify_run(tmp_path))
    assert "attestations.jsonl is missing or cannot be read" in page
    assert "There are no statements to show." in page


def test_nothing_in_the_evidence_is_markup(tmp_path: Path) -> None:
    def alter(name: str, it: Any) -> Any:
        if name == "delivery":
            return replace(it, metrics={EVIL: 1.0})
        if name.startswith("job"):
            return replace(it, cuts=[[EVIL], [EVIL]], run=EVIL)
        if name.startswith("round"):
            mark = replace(it.watermark, bits=0, matches=0, skipped=EVIL)
            return replace(it, watermark=mark)
        return it

    made = Made(tmp_path / "7", 1, 1, alter=alter)
    made.write("privacy.json", '{"words": "<b>bold</b>\\u202e"}')
    (party,) = (it for it in made.jobs[0].parties if it.role == "trainer")
    told = facts(made, Trust((Party(EVIL, "trainer", party.key),)))
    told = replace(told, names={**told.names, made.jobs[0].party("relay"): f"\u0007{EVIL}"})
    page = page_of(told)
    assert "<script" not in page
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;?" in page
    assert "\u0007" not in page
    assert "&lt;script&gt;" in page
    picture(page)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", 2, 2, (Attempt(), Attempt("8", 1)))
    page = page_of(facts(made, made.trust))
    assert not re.search(r"(?i)https?:|//|url\((?!#)|@import|<script|\son\w+=|src=", page)
    assert set(re.findall(r'href="([^"]*)"', page)) == {
        f"#line-{i + 1}" for i in range(len(made.lines))
    }
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_a_long_run_stays_readable_and_small(tmp_path: Path) -> None:
    def alter(name: str, it: Any) -> Any:
        return replace(it, steps=3) if name == "round 50.2" else it

    made = Made(tmp_path / "7", 4, 100, alter=alter)
    page = page_of(facts(made))
    assert len(page.encode()) < 1_000_000
    found = cells(page)
    assert len(found) == len(made.lines)
    assert [line for line, kind in found.items() if kind == "card bad"] == [
        made.index("round 50.2") + 1
    ]
    wide = {it for it in words(page) if it.startswith("round ")}
    assert wide == {f"round {n}" for n in (1, 2, 50, 99, 100)}
    assert "rounds 3 to 49, folded" in words(page)
    assert float(picture(page).attrib["viewBox"].split()[2]) < 3000


def test_statements_that_belong_nowhere_have_a_cell_too(tmp_path: Path) -> None:
    def alter(name: str, it: Any) -> Any:
        if name == "round 1.2":
            return replace(it, segment=9)
        return replace(it, job="0" * 64) if name == "round 2.1" else it

    made = Made(tmp_path / "7", 2, 2, alter=alter)
    page = page_of(facts(made))
    assert set(cells(page)) == set(range(1, len(made.lines) + 1))
    assert "of no job here" in words(page)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (1500, "1,500"), (1_234_567, "1.23 M"), (2**63, "9,223 P")],
)
def test_numbers_are_short(number: int, text: str) -> None:
    assert count(number) == text


def test_texts_are_cut_to_their_place() -> None:
    assert cut("Northern Compute", 16) == "Northern Compute"
    assert cut("Northern Compute", 10) == "Northern …"
    assert cut("東京計算株式会社", 10) == "東京計算…"
    assert [seconds(it) for it in (0.0714, 59.9, 600, 86400)] == [
        "0.0714 s",
        "59.9 s",
        "10 min",
        "24 h",
    ]
