"""Outcomes of `compressor check` in the words of what runs it: JUnit's XML, GitHub's annotations, Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from ..compress.check import Outcome

_BAD = ("failed", "worse")


def junit(outcomes: Sequence[Outcome]) -> str:
    """A test suite of a case each; what failed to run is an error, all else that moved a failure."""
    moved = [outcome for outcome in outcomes if outcome.verdict != "same"]
    errors = sum(outcome.verdict == "failed" for outcome in moved)
    seconds = f"{sum(outcome.seconds for outcome in outcomes):.1f}"
    suite = ElementTree.Element(
        "testsuite", name="compressor check", tests=str(len(outcomes)), errors=str(errors),
        failures=str(len(moved) - errors), time=seconds,
    )  # fmt: skip
    for outcome in outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", classname=outcome.case.model, name=outcome.case.recipe, time=f"{outcome.seconds:.1f}"
        )
        if outcome.verdict != "same":
            tag = "error" if outcome.verdict == "failed" else "failure"
            ElementTree.SubElement(case, tag, type=outcome.verdict, message=outcome.said)
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def github(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Commands of GitHub's workflows: errors for what is worse, warnings for what nobody has recorded."""
    for outcome in outcomes:
        if outcome.verdict != "same":
            level = "error" if outcome.verdict in _BAD else "warning"
            said = f"{outcome.case}: {outcome.said}".replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
            yield f"::{level} title=compressor check ({outcome.verdict})::{said}"


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A table of all cases, what moved first."""
    order = sorted(outcomes, key=lambda outcome: outcome.verdict == "same")
    lines = ["### compressor check", "", "| model / recipe | KL | perplexity × | bytes | |", "|---|---|---|---|---|"]
    for outcome in order:
        found = outcome.figures
        cells = "– | – | –"
        if found is not None:
            cells = f"{found.kl_mean:.5f} | {found.perplexity_ratio:.4f} | {found.bytes:,}"
        said = "" if outcome.verdict == "same" else f"**{outcome.verdict}**: {outcome.said}"
        lines.append(f"| {outcome.case} | {cells} | {said.replace('|', chr(92) + '|').replace(chr(10), ' ')} |")
    return "\n".join(lines) + "\n"
