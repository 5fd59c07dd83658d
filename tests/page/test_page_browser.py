"""The page in a headless Chromium: no complaint, no request, no sideways scrolling; keyboard, tips, themes, paper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page
from page_reports import FAULT, LACKING, every_report, made_up_json

from aprjax.bisect.page.build import render_page
from aprjax.bisect.page.documents import as_document
from aprjax.bisect.report import Verdict

pytestmark = pytest.mark.chromium

PAGES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "all": every_report,
    "divergence": lambda: [made_up_json(layers=12, positions=24)],
    "agree": lambda: [made_up_json(verdict=Verdict.AGREE, layers=28, positions=511)],
    "unmeasured": lambda: [made_up_json(verdict=Verdict.UNMEASURED, layers=4, positions=5)],
}
GROUND = "getComputedStyle(document.body).backgroundColor"
DARK, LIGHT = "rgb(22, 23, 27)", "rgb(247, 246, 243)"
# WCAG 2.2, success criterion 1.4.3 (AA): of text; large text is 24 px, or bold 18.7 px.
CONTRAST, LARGE_CONTRAST = 4.5, 3.0

# Texts whose contrast with what lies behind them is too low; only plain backgrounds can be computed.
FAINT = (
    (
        """(() => {
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(c => (c /= 255, c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const style = getComputedStyle(one);
      if (style.backgroundImage !== 'none') return null;
      const colour = parse(style.backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
      if (colour[3] > 0) return null;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || ['SCRIPT', 'STYLE'].includes(element.tagName) || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ground = behind(element);
    if (!ground) continue;
    const ink = parse(element.closest('svg') ? style.fill : style.color);
    const [low, high] = [luminance(ink), luminance(ground)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.7 && Number(style.fontWeight) >= 700);
    if ((high + 0.05) / (low + 0.05) < (large ? %LARGE% : %SMALL%)) found.push(node.data.trim().slice(0, 40));
  }
  return [...new Set(found)];
})()"""
    )
    .replace("%LARGE%", str(LARGE_CONTRAST))
    .replace("%SMALL%", str(CONTRAST))
)

# Elements that reach beyond the window although nothing around them scrolls or clips.
OUTSIDE = """[...document.body.querySelectorAll('*')].filter(e => {
  if (!e.checkVisibility() || e.closest('.skip')) return false;
  for (let one = e; one; one = one.parentElement) if (getComputedStyle(one).overflowX !== 'visible') return false;
  return e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => e.tagName + '.' + e.getAttribute('class')).slice(0, 5)"""

NAMELESS = """[...document.querySelectorAll('button,a,input,[role],svg[role]')].filter(e => {
  const structure = ['presentation', 'row', 'grid', 'cell'].includes(e.getAttribute('role'));
  if (structure || e.closest('[aria-hidden=true]')) return false;
  const words = [e.getAttribute('aria-label'), e.textContent.trim(), ...[...(e.labels || [])].map(l => l.textContent)];
  return !words.some(Boolean) && e.id !== 'tip';
}).map(e => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, make in PAGES.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(render_page([as_document(report) for report in make()]), encoding="utf-8")
    return found


@pytest.fixture
def opened(browser: Browser, files: dict[str, Path]) -> Iterator[Callable[..., Page]]:
    pages = []

    def show(name: str, **options: Any) -> Page:
        pages.append(browser.open(files[name], **options))
        return pages[-1]

    yield show
    for page in pages:
        page.close()


def cell(layer: int, stage: str) -> str:
    return f"[data-cell='{layer}:{stage}']"


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1440, False)], ids=["360 dark", "1440 light"])
def test_it_opens_without_complaint_and_fits(
    opened: Callable[..., Page], files: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    page = opened(name, width=width, dark=dark)
    page.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.complaints == []
    assert page.requests == [files[name].as_uri()]
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run(OUTSIDE) == []
    assert page.run(FAINT) == []
    assert page.run(NAMELESS) == []
    assert page.run(GROUND) == (DARK if dark else LIGHT)
    assert page.run("document.querySelectorAll('h1').length") == 1
    assert page.run(
        "[...document.querySelectorAll('section.report, #findings, #provenance')].every(e => e.offsetHeight > 80)"
    )
    assert page.screenshot().startswith(b"\x89PNG")


def test_the_keyboard_moves_over_the_heat_map_and_opens_a_stage(opened: Callable[..., Page]) -> None:
    page = opened("divergence")
    layer, stage = FAULT
    assert page.run("document.querySelector('.heat [tabindex=\"0\"]').dataset.cell") == f"{layer}:{stage}"
    assert page.run("document.querySelectorAll('.heat [tabindex=\"0\"]').length") == 1
    assert page.run("document.querySelector('.detail h4').textContent") == f"layer {layer}, {stage}"
    page.run(f'document.querySelector("{cell(layer, str(stage))}").focus()')
    page.press("ArrowDown", code=40)
    page.press("ArrowRight", code=39)
    assert page.run("document.activeElement.dataset.cell") == f"{layer + 1}:ffn_up"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tip = page.run("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    assert f"layer {layer + 1}, ffn_up" in tip
    page.press("Enter", code=13, text="\r")
    assert page.run("document.querySelector('.detail h4').textContent") == f"layer {layer + 1}, ffn_up"
    assert page.run("document.querySelectorAll('.heat [aria-selected=true]').length") == 1
    page.press("Escape", code=27)
    assert page.run("document.getElementById('tip').hidden")
    # Home and End stay in the row; the wide cells outside the layers are reached from any column.
    page.press("Home", code=36)
    assert page.run("document.activeElement.dataset.cell") == f"{layer + 1}:attn_norm"
    for _ in range(20):
        page.press("ArrowUp", code=38)
    assert page.run("document.activeElement.dataset.cell") == "-1:embedding"
    assert page.complaints == []


def test_a_stage_shows_its_numbers_positions_and_channels(opened: Callable[..., Page]) -> None:
    report = made_up_json(layers=12, positions=24)
    layer, stage = FAULT
    found = next(one for one in report["layers"] if one["layer"] == layer)["stages"][stage]
    page = opened("divergence")
    page.point_at(cell(layer, str(stage)))
    tip = page.run("document.getElementById('tip').textContent")
    assert "local 0.7, running 0.8" in tip
    assert page.run("!document.getElementById('tip').hidden")
    page.run(f'document.querySelector("{cell(layer, str(stage))}").click()')
    text = page.run("document.querySelector('.detail').textContent")
    for words in (
        "local rel L20.7",
        "rounding explains8.00e−7",
        f"std ratio{found['std_ratio']:.4g}",
        "position 23 “ the”",
    ):
        assert words in text, words
    charts = "document.querySelectorAll('.detail svg')"
    assert page.run(f"{charts}.length") == 4
    assert page.run(f"[...{charts}].map(svg => svg.querySelectorAll('rect').length)") == [24, 64, 24, 64]
    # The tallest bar is the position whose difference is the largest.
    largest = re.search(r"Largest: position (\d+)", text)
    assert largest is not None
    heights = page.run(f"[...{charts}[0].querySelectorAll('rect')].map(bar => Number(bar.getAttribute('height')))")
    assert int(largest[1]) == heights.index(max(heights))


def test_what_was_not_measured_is_hatched_and_says_why(opened: Callable[..., Page]) -> None:
    page = opened("divergence")
    style = f'getComputedStyle(document.querySelector("{cell(3, str(LACKING))}"))'
    assert "repeating-linear-gradient" in page.run(f"{style}.backgroundImage")
    assert page.run(f"{style}.backgroundColor") in ("rgba(0, 0, 0, 0)", "rgb(255, 255, 255)")
    page.run(f'document.querySelector("{cell(3, str(LACKING))}").click()')
    assert "the model's trace lacks this stage" in page.run("document.querySelector('.detail').textContent")
    # A number's colour is another for another measure.
    shade = f'getComputedStyle(document.querySelector("{cell(11, "ffn_out")}")).backgroundColor'
    local = page.run(shade)
    page.run("document.querySelector('.measures input[value=free]').click()")
    assert page.run(shade) != local
    assert page.run(f'document.querySelector("{cell(*FAULT)}").className') == "first"
    mark = page.run(f"getComputedStyle(document.querySelector(\"{cell(*FAULT)}\"), '::after').transform")
    assert mark != "none", "the first divergence has no sign of its own"


def test_tokens_differ_by_sign_and_not_by_colour_alone(opened: Callable[..., Page]) -> None:
    page = opened("all")
    seen = page.run(
        "[...document.querySelectorAll('#margins-7 .strip .token, .strip .token')].map(t => [t.className.split(' ')[1],"
        " t.querySelector('b') ? t.querySelector('b').textContent : '', getComputedStyle(t).borderTopStyle])"
    )
    kinds = {(tone, sign) for tone, sign, _ in seen}
    assert {("good", ""), ("bad", "≠")} <= kinds
    borders = {tone: border for tone, _, border in seen}
    assert borders["bad"] == "solid"
    assert borders.get("near", "dashed") == "dashed"
    strip = ".strip[aria-label^='Tokens of']"
    page.run(f'document.querySelector("{strip}").firstElementChild.focus()')
    page.press("ArrowDown", code=40)
    assert "divergence" in page.run("document.activeElement.getAttribute('aria-label')")
    assert page.run("document.activeElement.getAttribute('aria-selected')") == "true"


def test_the_theme_can_be_chosen_and_stays(opened: Callable[..., Page]) -> None:
    page = opened("unmeasured")
    assert page.run(GROUND) == LIGHT
    page.run("document.getElementById('theme').click()")
    try:
        assert page.run(GROUND) == DARK
        assert page.run("document.getElementById('theme').getAttribute('aria-pressed')") == "true"
        page.reload()
        assert page.run(GROUND) == DARK
    finally:
        page.run("localStorage.clear()")
    assert opened("unmeasured", dark=True).run(GROUND) == DARK


def test_on_paper_everything_is_open_and_light(opened: Callable[..., Page]) -> None:
    page = opened("all", dark=True, width=800)
    assert page.run("document.querySelectorAll('details:not([open])').length") > 5
    page.emulate(dark=True, printed=True)
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("document.querySelectorAll('details:not([open])').length") == 0
    assert page.run(GROUND) == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('.heat td')).printColorAdjust") == "exact"
    assert page.run("getComputedStyle(document.querySelector('.theme')).display") == "none"
    assert page.run(OUTSIDE) == []
    assert page.run("document.documentElement.scrollWidth") <= 800
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("document.querySelectorAll('details:not([open])').length") > 5


def test_hostile_texts_run_nothing_and_are_shown(browser: Browser, tmp_path: Path) -> None:
    report = made_up_json(layers=10, positions=6)
    word = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">\u2028"
    report["token_texts"] = {"16": word, "17": "`" + word}
    report["first_divergence"]["cause"] = report["prompt"]["text"] = report["sides"]["model"]["path"] = word
    file = tmp_path / "hostile.html"
    file.write_text(render_page([as_document(report)]), encoding="utf-8")
    page = browser.open(file)
    try:
        assert page.run("document.title") == "aprjax layers: divergence at layer 9, ffn_gate"
        assert page.complaints == []
        assert page.requests == [file.as_uri()]
        assert page.run("document.querySelector('.token span').textContent") == word
        page.run("document.querySelector('.heat [aria-selected=true]').click()")
        assert "onerror" in page.run("document.querySelector('.detail').textContent")
        assert page.run("document.querySelectorAll('img').length") == 0
        assert page.run("[...document.scripts].map(script => script.type)") == ["application/json", ""]
    finally:
        page.close()
