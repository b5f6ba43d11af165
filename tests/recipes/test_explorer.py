"""The page that a browser sees, as a file and in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
import requests
from browser import CHROMIUM, Browser
from served import running, save_home

from steertune.recipes.serving import explorer

PAGE = Path(explorer.__file__).with_suffix(".html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return save_home(tmp_path_factory.mktemp("served"))


def test_the_page_loads_nothing_and_runs_nothing_but_its_own_script(home):
    """It is served without a key, and says by policy what the browser lets it do."""
    with running(home, key="a-key") as served:
        reply = requests.get(served.url)
        assert reply.status_code == 200 and reply.text == PAGE
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["Content-Security-Policy"].split(";"))
    [script] = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'" and policy["connect-src"] == "'self'"
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert not re.search(r"https?://|//cdn|innerHTML|insertAdjacentHTML|eval\(| on\w+=", PAGE)
    for field in re.findall(r"<(?:input|textarea) id=\"([\w-]+)\"", PAGE):
        assert f'for="{field}"' in PAGE or re.search(rf'<label[^>]*>[^<]*<input id="{field}"', PAGE), field


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_strength_is_moved_with_the_keyboard_and_answers_stream(home, tmp_path):
    with running(home, key="a-key") as served, Browser() as browser:
        browser.open(served.url)
        browser.wait("!document.getElementById('key-label')?.hidden", 30)
        browser.run("document.getElementById('key').value = 'a-key'")
        browser.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        browser.wait("document.querySelectorAll('.vector').length === 2")
        assert browser.run("document.getElementById('model').textContent") == "tiny"

        def text(side: str) -> str:
            return browser.run(f"document.getElementById('{side}-text').textContent")

        def answered() -> None:
            quiet = "document.getElementById('{}-text').getAttribute('aria-busy') === 'false'"
            both = " && ".join(quiet.format(side) for side in ("base", "steered"))
            browser.wait(f"{both} && document.getElementById('steered-state').textContent.includes(' s')")

        # as by hand: a prompt, then the button by keyboard
        browser.run("document.getElementById('prompt').value = '<b>the</b> cat'")
        browser.run("document.getElementById('tokens').value = 8")
        browser.run("document.querySelector('button').focus()")
        browser.press(" ", 32)
        answered()
        base, first = text("base"), text("steered")
        assert base and first and base != first
        browser.run("document.getElementById('strength-careful').focus()")
        for _ in range(25):
            browser.press("ArrowLeft", 37)
        assert browser.run("document.getElementById('strength-careful').value") == "-1.5"
        browser.wait(f"document.getElementById('steered-text').textContent !== {first!r}")
        answered()
        assert text("base") == base
        assert "careful=-1.5" in browser.run("location.hash")

        # the address brings it all back
        address = browser.run("location.href")
        second = text("steered")
        browser.open("about:blank")
        browser.open(address)
        browser.wait("!document.getElementById('key-label')?.hidden", 30)
        browser.run("document.getElementById('tokens').value = 8")
        browser.run("document.getElementById('key').value = 'a-key'")
        browser.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        browser.wait("document.getElementById('steered-text')?.textContent")
        answered()
        assert text("steered") == second and browser.run("document.getElementById('prompt').value") == "<b>the</b> cat"
        refused = [message for message in browser.messages if "401" not in message]
        assert refused == [], "nothing is blocked by the page's own policy"
