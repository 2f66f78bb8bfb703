"""The live page in a real browser, before a whole fleet.

With OUTRIDER_SCREENSHOTS=docs it also takes the pictures of the documentation, of real models.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from drafter_service.proposers.base import Proposer
from orchestrator.http.keys import ApiKey, Keyring
from outrider.config import DEFAULT_CACHE
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model
from tests.support.fleet import DRAFT, TARGET, drafter, language_model, load, lookup, verifier
from tests.support.http_door import RunningDoor, http_door
from verifier_service.config import EngineConfig

pytest.importorskip("selenium", reason="selenium is not installed")

from tests.support.browser import LAPTOP, PHONE, Browser, browser, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

UNHURRIED = EngineConfig(warm_up=False, step_delay_s=0.02)
"""As slow as a real target, so that drafts of every drafter come in time on any machine."""
SCREENSHOTS = os.environ.get("OUTRIDER_SCREENSHOTS")
KEY = "lettersAndDigits123"
PROMPT = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n"
COUNTING = "one two three four five six, one two three four five six, one two"
TEXTS = (
    "#status, nav a, h1, dt, dd, label, small, #summary, #go, #other, #times, #verdict, .guess,"
    " #legend button, th, td"
)
NOTHING = "\N{EN DASH}"
READABLE = 4.5
"""Contrast that WCAG 2 (AA) asks of text."""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@contextlib.asynccontextmanager
async def fleet(
    target: LanguageModel,
    proposer: Proposer,
    name: str = "tiny",
    config: EngineConfig = UNHURRIED,
) -> AsyncIterator[RunningDoor]:
    async with (
        verifier(target, name=name, config=config) as judge,
        drafter(proposer) as guesser,
        drafter(lookup()) as finder,
        http_door([judge.address], [guesser.address, finder.address]) as door,
    ):
        yield door


def generate(page: Browser) -> str:
    """Press the button, and return the text once it is whole."""
    page.click("#go")
    return await_answer(page)


def await_answer(page: Browser) -> str:
    """Wait for what was asked for, and return the text."""
    page.until("document.getElementById('summary').textContent")
    page.until("document.getElementById('go').textContent === 'Generate'")
    return page.text("output")


def sources(page: Browser) -> set[int]:
    """Whose tokens are to be seen in the output."""
    spans = "document.querySelectorAll('#output span')"
    return set(map(int, page.value(f"[...{spans}].map(span => span.dataset.source)")))


def drawn(page: Browser, marks: str) -> int:
    """How many such marks the latest answer's timeline has."""
    return int(page.value(f"document.querySelectorAll('#timeline :is({marks})').length"))


def width(page: Browser, selector: str) -> float:
    """In CSS pixels."""
    return float(page.value(f"document.querySelector({selector!r}).getBoundingClientRect().width"))


def check_looks(page: Browser) -> None:
    """Everything fits and can be read, on a laptop and on a phone, light and dark."""
    for size in (LAPTOP, PHONE):
        for dark in (False, True):
            page.resize(size, dark=dark)
            assert page.value("document.documentElement.scrollWidth") <= size[0]
            assert page.too_wide() == [], size
            assert page.contrast_min(TEXTS) >= READABLE, (size, dark)
    page.resize(LAPTOP)


def fill(page: Browser) -> None:
    page.until("document.getElementById('model').value === 'tiny'")
    page.choose("kind", "text")
    page.type("prompt", PROMPT)
    page.type("tokens", "120")


def play(page: Browser, url: str) -> None:
    page.resize(LAPTOP)
    page.open(url)
    check_looks(page)
    fill(page)
    speculated = generate(page)
    assert page.text("count") == "120"
    assert float(page.text("rate")) > 0
    assert float(page.text("tau")) > 1
    assert page.text("acceptance").endswith(" %")
    assert page.text("first").endswith(" ms")
    assert 0 in sources(page)
    assert len(sources(page)) >= 2
    assert "tiny-draft" in page.text("legend")
    assert drawn(page, ".drafting") > 0
    assert drawn(page, ".hit") > 0
    coloured = "new Set([...document.querySelectorAll('.guess')]" + (
        ".map(span => getComputedStyle(span).backgroundColor))"
    )
    assert page.value(f"{coloured}.size") == len(sources(page) - {0})
    assert page.value("document.getElementById('race').hidden")
    check_looks(page)

    page.click("#other")  # The same request, the other way.
    plain = await_answer(page)
    assert not page.value("document.getElementById('speculate').checked")
    assert plain == speculated
    assert sources(page) == {0}
    assert (page.text("tau"), page.text("acceptance")) == ("1.00", NOTHING)
    assert page.text("verdict") == "as fast, and the same tokens"
    assert page.text("times").endswith("\N{MULTIPLICATION SIGN}")
    assert page.text("plain") == f"{page.text('rate')} tokens/s"
    fast, slow = (float(page.text(name).split()[0]) for name in ("fast", "plain"))
    assert width(page, "#plain-bar") / width(page, "#fast-bar") == pytest.approx(
        slow / fast, rel=0.05
    )
    assert page.value("document.getElementById('other').hidden")
    check_looks(page)
    assert drawn(page, ".verifying") >= 120
    assert drawn(page, ".drafting, .hit") == 0


def watch(page: Browser) -> None:
    page.click("#to-fleet")
    assert page.value("document.getElementById('no-timeline').hidden")
    lanes = page.value("[...document.querySelectorAll('#lanes div')].map(one => one.innerText)")
    assert lanes[:2] == ["session", "verifier"]
    assert page.text("timeline-summary").startswith("120 verify steps, 0 of them")
    assert width(page, "#lanes-scroll svg") >= width(page, "#lanes-scroll") > 500
    assert page.value("document.getElementById('playground').hidden")
    page.until("document.querySelectorAll('#workers tr').length === 3")
    rows = page.value("[...document.querySelectorAll('#workers tr')].map(row => row.innerText)")
    assert all("ready" in row for row in rows)
    assert [word in rows[0] for word in ("verifier", "tiny", "127.0.0.1:", "ms")] == [True] * 4
    assert " of 64" in rows[0]
    assert any(" %" in row for row in rows[1:])
    page.until("+document.getElementById('fleet-tokens').textContent === 240")
    assert float(page.text("fleet-tau")) > 1
    assert page.text("status") == "1 verifier, 2 drafters"
    check_looks(page)


def complain(page: Browser) -> None:
    """What is wrong is said, and in words."""
    page.click("#to-playground")
    page.type("tokens", "99999999")
    page.click("#go")
    page.until("!document.getElementById('error').hidden")
    assert "Not generated: " in page.text("error")
    assert "max_tokens" in page.text("error") or "tokens" in page.text("error")
    assert page.contrast_min("#error") >= READABLE
    assert page.text("go") == "Generate"


async def test_the_page_shows_who_guessed_what(chromium: Browser) -> None:
    async with fleet(load(TARGET), language_model(load(DRAFT))) as door:
        await asyncio.to_thread(play, chromium, door.url)
        await asyncio.to_thread(watch, chromium)
        assert chromium.complaints() == []
        await asyncio.to_thread(complain, chromium)
    gone = "document.getElementById('status').textContent === 'the orchestrator does not answer'"
    await asyncio.to_thread(chromium.until, gone)
    chromium.complaints()  # Of a request that was refused, and of a server that is gone.


async def test_the_page_works_with_an_api_key(chromium: Browser) -> None:
    def visit(url: str) -> None:
        chromium.open(url)
        fill(chromium)
        assert generate(chromium)
        assert chromium.complaints() == []

    async with fleet(load(TARGET), language_model(load(DRAFT))) as door:
        door.door.keyring = Keyring([ApiKey("somebody", hashlib.sha256(KEY.encode()).digest())])
        # What a browser makes of the key once somebody has typed it.
        await asyncio.to_thread(visit, door.url.replace("://", f"://any:{KEY}@"))


@pytest.mark.skipif(SCREENSHOTS is None, reason="OUTRIDER_SCREENSHOTS names no folder")
@pytest.mark.timeout(280)
async def test_screenshots(chromium: Browser) -> None:
    folder = Path(str(SCREENSHOTS))

    def take(url: str) -> None:
        page = chromium
        page.resize(LAPTOP)
        page.open(url)
        page.until("document.getElementById('model').value === 'smollm2'")
        page.type("tokens", "128")
        page.click(".switch")
        generate(page)
        page.click(".switch")
        for _ in range(2):  # The first one also finds out how long steps take.
            generate(page)
        page.screenshot(folder / "page-playground.png")
        page.resize(PHONE, dark=True)
        page.run("document.getElementById('numbers').scrollIntoView(); scrollBy(0, -16)")
        page.screenshot(folder / "page-phone.png")
        page.resize(LAPTOP, dark=True)
        page.choose("kind", "text")
        page.type("prompt", COUNTING)
        page.type("tokens", "64")
        generate(page)
        page.click("#to-fleet")
        page.until("document.getElementById('sessions').textContent === '0'")
        page.screenshot(folder / "page-fleet.png")

    target = load_language_model("smollm2", device="cpu", cache_dir=DEFAULT_CACHE)
    async with fleet(target, lookup(), "smollm2", EngineConfig(warm_up=False)) as door:
        await asyncio.to_thread(take, door.url)
