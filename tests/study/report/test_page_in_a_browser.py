"""The page in headless Chromium: its tables sort, search and download, it fits a telephone, and nothing fails or is fetched."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cases.study import grid, write_study

from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium; install one to run the report's script")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIET += ("--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files")

ACTIONS = """
const failures = [];
addEventListener("error", event => failures.push(event.message));
addEventListener("load", async () => {
  const tables = [...document.querySelectorAll("#tables table, table")].filter(t => t.tBodies[0].textContent.includes("lsq"));
  const table = tables.find(t => t.tBodies[0].rows.length > 5 && t.tHead.rows.length === 1);
  const heads = [...table.tHead.rows[0].cells], words = c => c.textContent.trim();
  const column = k => [...table.tBodies[0].rows].map(row => words(row.cells[k]));
  const found = { heads: heads.map(words), before: column(0) };
  heads[1].click(); found.rising = column(1);
  heads[1].click(); found.falling = column(1);
  heads[0].dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" })); found.names = column(0);
  const tools = table.parentElement.previousElementSibling, search = tools.querySelector("input"), link = tools.querySelector("a");
  search.value = "lsq w4"; search.dispatchEvent(new Event("input"));
  found.shown = [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => words(row.cells[0]));
  search.value = ""; search.dispatchEvent(new Event("input"));
  link.addEventListener("click", event => event.preventDefault()); link.click();
  found.csv = await (await fetch(link.href)).text();
  found.fetched = performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !/^(data|blob):/.test(name));
  found.failures = failures;
  const answer = document.createElement("pre");
  answer.id = "answer"; answer.textContent = JSON.stringify(found);
  document.body.append(answer);
});
"""


def rendered(path: Path, folder: Path) -> str:
    """The document after its scripts have run."""
    command = [
        str(BROWSER),
        *QUIET,
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer(document: str) -> dict:
    found = re.search(r'<pre id="answer">(.*?)</pre>', document, re.DOTALL)
    assert found, document[-2000:]
    return json.loads(html.unescape(found[1]))


def leading(cells: list[str]) -> list[float]:
    return [float(re.match(r"[-+]?[\d.]+", cell.replace("−", "-"))[0]) for cell in cells]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    keys = grid(methods=["minmax", "gptq", "lsq_contrastive"], bits=[(8, 8), (4, 8)], scopes=["vision", "vision_text"])
    study = write_study(tmp_path_factory.mktemp("study"), keys, size=0.06)
    return write_report(analyse(StudyResults.load(study.root)))


def test_tables_sort_search_and_download(page, tmp_path):
    acted = tmp_path / "acted.html"
    acted.write_text(page.read_text().replace("<script>", f"<script>{ACTIONS}</script><script>", 1))
    found = answer(rendered(acted, tmp_path))
    assert found["failures"] == [] and found["fetched"] == []
    assert sorted(found["names"]) == sorted(found["before"]) and len(set(found["before"])) == len(found["before"])
    rising, falling = leading(found["rising"]), leading(found["falling"])
    assert rising == sorted(rising) and falling == sorted(rising, reverse=True) and rising[0] < rising[-1]
    assert found["names"] == sorted(found["names"])
    assert found["shown"] and all("lsq" in name and "W4" in name for name in found["shown"])
    assert len(found["shown"]) == sum("lsq" in name and "W4" in name for name in found["before"])
    lines = list(csv.reader(io.StringIO(found["csv"].removeprefix("\ufeff"))))
    assert [line[0] for line in lines[1:]] == [re.sub(r"\s+", " ", name) for name in found["names"]]
    assert {len(line) for line in lines} == {len(found["heads"])}


@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_runs_off_the_screen(page, width, tmp_path):
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body><iframe id="f" src="{page.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe><script>'
        "document.getElementById('f').addEventListener('load', e => { const d = e.target.contentDocument;"
        "const a = document.createElement('pre'); a.id = 'answer'; a.textContent = JSON.stringify({"
        "width: d.documentElement.clientWidth, scroll: d.documentElement.scrollWidth,"
        "links: [...d.querySelectorAll('nav a')].map(l => l.getBoundingClientRect().right)"
        "}); document.body.append(a); });</script></body>"
    )
    found = answer(rendered(frame, tmp_path))
    assert found["width"] <= width and found["scroll"] <= found["width"], found
    assert found["links"] and max(found["links"]) <= found["width"]
