"""The report of an output: what it says, that it is one page, and how it looks in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import run

from compressor.cli.apply import apply as apply_command
from compressor.compress.apply import apply
from compressor.compress.job import Job
from compressor.compress.output.folder import REPORT
from compressor.compress.output.verify import verify
from compressor.compress.recipe import parse_recipe
from compressor.compress.report.content import Content
from compressor.compress.report.page import Sample, write_report
from compressor.runtime.errors import VerifyError

Pico = Callable[..., Path]
VOID = {"meta", "br", "link", "img"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Elements of a page, which have to be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.found, self.words = list[str](), list[tuple[str, dict[str, str | None]]](), list[str]()
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def output(model: Path, passes: str, text: Path, out: Path) -> Path:
    recipe = f"version: 1\ndata: {{source: {text}, samples: 4, sequence_length: 64}}\npasses: {passes}\n"
    apply(Job(parse_recipe(recipe, "r"), recipe, ("data.samples=4",), model, out, str(model)), lambda event: None)
    return out


@pytest.fixture(scope="module")
def dense(pico: Pico, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    passes = "[{kind: gptq, bits: 3, group_size: 32, ignore: ['*.1.*']}, {kind: rtn, group_size: 32, targets: '*.1.*'}]"
    return output(pico(), passes, calibration_text, tmp_path_factory.mktemp("dense") / "out")


@pytest.fixture(scope="module")
def mixture(pico: Pico, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    passes = "[{kind: expert_prune, ratio: .25}, {kind: lorc, ratio: .5}, {kind: rtn, group_size: 32}]"
    return output(pico("qwen3_moe"), passes, calibration_text, tmp_path_factory.mktemp("mixture") / "out")


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_report_is_one_page_with_all_there_is_to_say(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    page = write_report(folder, samples=[Sample("<b>once</b>", "a", "b")])
    assert page == folder / REPORT
    text = page.read_text(encoding="utf-8")
    read = Page(text)
    words = " ".join(read.words)
    assert not [attrs for tag, attrs in read.found if tag in ("script", "link", "img", "iframe")]
    assert set(re.findall(r"https?://[\w./-]+", text)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink", "http://purl.org/dc/elements/1.1/",
        "http://creativecommons.org/ns", "http://www.w3.org/1999/02/22-rdf-syntax-ns", "http://purl.org/dc/dcmitype/StillImage",
        "https://matplotlib.org/",
    }  # fmt: skip
    assert "<b>once</b>" in words, "what models write is text"
    assert not re.search("#0[147a]0", text), "every colour is the page's"
    manifest = json.loads((folder / "compressor.json").read_text())
    assert f"{manifest['quality']['held-out']['against']['kl_mean']:.4g}" in words
    titles = {"Error by linear", "Drift of the residual stream", "Where the bytes are", "Time by block"}
    more = {"dense": {"Bits by linear"}, "mixture": {"What experts put out", "Experts that stay"}}[kind]
    assert titles | more <= {word.strip() for word in read.words}
    assert len([tag for tag, _ in read.found if tag == "svg"]) == text.count("<figure>") >= 4
    assert sum(attrs.get("id") is not None for _, attrs in read.found) > 0


def test_errors_of_experts_are_averaged_over_their_weights(mixture: Path) -> None:
    content = Content.read(mixture)
    names, blocks = content.linears
    place = names.index("mlp.experts.*.down_proj")
    found = content.by_block("error")[blocks.index(1)][place]
    errors = {
        event["name"]: event["error"]
        for event in content.events
        if event["kind"] == "LayerDone" and re.search(r"\.1\.mlp\.experts\.\d+\.down_proj", event["name"])
    }
    assert len(errors) > 2
    assert found == pytest.approx(sum(errors.values()) / len(errors))


def test_what_fits_beside_the_weights(mixture: Path) -> None:
    content = Content.read(mixture)
    memory, before, after = content.context[0]
    weights, cached = content.bytes[1], content.cached[1]
    assert content.cached[1] < content.cached[0]
    assert after * cached <= memory * 1e9 - weights < (after + 1) * cached
    assert before < after


def test_numbers_that_are_none_are_left_out(dense: Path, tmp_path: Path) -> None:
    """As of a model that gives NaN: what could not be measured is null in files."""
    shutil.copytree(dense, tmp_path / "odd")
    for name in ("compressor.json", "report/quality.json"):
        path = tmp_path / "odd" / name
        path.write_text(re.sub(r'("(?:kl_\w+|perplexity\w*|base_perplexity)": )[-\d.e]+', r"\1null", path.read_text()))
    quality = json.loads((tmp_path / "odd" / "report" / "quality.json").read_text())
    quality["drift"][-1] = None
    (tmp_path / "odd" / "report" / "quality.json").write_text(json.dumps(quality))
    layers = tmp_path / "odd" / "report" / "layers.jsonl"
    layers.write_text(re.sub(r'("error": )[-\d.e]+', r"\1NaN", layers.read_text()))
    words = " ".join(Page(write_report(tmp_path / "odd").read_text(encoding="utf-8")).words)
    assert "KL from the original" in words
    assert "nan" not in words


def test_a_report_that_cannot_be_made_holds_no_output_back(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("compressor.compress.report.page.write_report", fails)
    out = tmp_path / "out"
    apply_command("w4a16-rtn", str(pico()), out, edits=["passes.0.group_size=32"])
    told = capsys.readouterr()
    assert "the report is not made (ValueError('no ink'))" in told.err
    assert "report:" not in told.out
    assert verify(out) == []


def test_what_is_no_output_or_an_old_one(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"no compressor\.json"):
        Content.read(tmp_path)
    shutil.copytree(dense, tmp_path / "old")
    (tmp_path / "old" / "report" / "plan.json").unlink()
    with pytest.raises(VerifyError, match="written by an older compressor"):
        Content.read(tmp_path / "old")
    (tmp_path / "old" / "report" / "plan.json").write_text("{")
    with pytest.raises(VerifyError, match="not readable"):
        Content.read(tmp_path / "old")


def test_the_command_compares_and_shows_what_both_write(
    pico: Pico, dense: Path, calibration_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    words = ("--against", pico(), "--samples", 2, "--data", calibration_text, "--out", out)
    assert run("report", dense, *words, cwd=tmp_path).stdout.strip() == str(out)
    text = " ".join(Page(out.read_text(encoding="utf-8")).words)
    assert "evaluation" in text
    assert "What the two write" in text
    run("report", dense, "--out", tmp_path, cwd=tmp_path, code=2)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_without_overflow_or_complaint(mixture: Path, tmp_path: Path, width: int) -> None:
    text = write_report(mixture, samples=[Sample("p" * 300, "a" * 300, "b c")]).read_text(encoding="utf-8")
    script = """<script>addEventListener("load", () => {
        const root = document.documentElement, figures = [...document.querySelectorAll("figure svg")]
        const seen = figures.filter(one => one.getBoundingClientRect().height > 50).length
        document.title = `${root.scrollWidth} ${innerWidth} ${seen}`
    })</script>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert title is not None
    scrolled, inner, figures_seen = map(int, title.groups())
    assert scrolled <= inner
    assert figures_seen == text.count("<figure>")
