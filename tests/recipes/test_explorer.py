"""The page that a browser sees, as a file and in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import requests
from browser import CHROMIUM, Browser
from served import running, save_home

from steertune.adapters.description import Strength, write_description
from steertune.recipes.lab.files import ArmError
from steertune.recipes.serving import explorer
from steertune.recipes.serving.notebook import FRAMES, Explorer

PAGE = explorer.whole_page()


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
    for field in re.findall(r"<(?:input|textarea|select) id=\"([\w-]+)\"", PAGE):
        assert f'for="{field}"' in PAGE or re.search(rf'<label[^>]*>[^<]*<(?:input|select) id="{field}"', PAGE), field


def test_a_notebook_shows_it_in_a_frame(home):
    """Only once it is asked to may pages of this machine frame it."""
    with running(home) as served:
        shown = served.explorer('the "cat"', {"careful": -1.5}, height=400)
        assert str(shown) == f"{served.url}/#prompt=the+%22cat%22&careful=-1.5"
        source = shown.url.replace("&", "&amp;")
        assert f'<iframe src="{source}"' in shown._repr_html_() and 'height="400"' in shown._repr_html_()
        policy = requests.get(served.url).headers["Content-Security-Policy"]
        assert policy.endswith(f"frame-ancestors {' '.join(FRAMES)}")
        assert str(served.explorer()) == served.url
        with pytest.raises(ArmError, match="vector 'warn' is none of"):
            served.explorer(strengths={"warn": 1.0})


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_the_curve_of_what_was_measured_has_the_current_point(tmp_path):
    """At strength 1 and, moved with the keyboard, at 1.5, between two measured points; beyond them there is none."""
    home = save_home(tmp_path)
    measured = {"0": {"kl": 0.0}, "1": {"kl": 0.4}, "2": {"kl": 1.0}}
    write_description(home / "careful", Strength(1.0, "hand", measured))
    with running(home) as served, Browser() as browser:
        browser.open(f"{served.url}/#careful=1")
        browser.wait("document.querySelectorAll('.vector').length === 2", 30)
        assert browser.run("document.querySelectorAll('.vector svg').length") == 1, "the other was not measured"
        browser.run("document.getElementById('strength-careful').focus()")
        told = []
        for presses in (0, 5, 10):
            for _ in range(presses):
                browser.press("ArrowRight", 39)
            shown = "['cx', 'visibility'].map((name) => document.querySelector('.vector .now').getAttribute(name))"
            told.append([*browser.run(shown), browser.run("document.querySelector('.vector title').textContent")])
        assert float(told[1][0]) > float(told[0][0]) and told[0][1] == told[1][1] == "visible"
        assert "At 1: KL 0.40" in told[0][2] and "At 1.5: KL 0.70" in told[1][2]
        assert told[2][1] == "hidden" and "Strength 2.5 is outside" in told[2][2]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_the_frame_of_a_notebook_loads(home, tmp_path):
    """From a page of another port of this machine, as a notebook is; without being asked to, it does not."""
    files = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    Thread(target=files.serve_forever, daemon=True).start()
    with running(home) as served, Browser() as browser:
        for asked in (False, True):
            frame = served.explorer("the cat") if asked else Explorer(served.url)
            (tmp_path / "cell.html").write_text(f"<title>cell</title>{frame._repr_html_()}")
            browser.messages.clear()
            browser.open(f"http://127.0.0.1:{files.server_port}/cell.html")
            browser.wait("document.title === 'cell' && document.readyState === 'complete'", 30)
            # a page that the browser has refused to frame asks the service for nothing
            before, end = served.service.metrics.text(), time.monotonic() + (20 if asked else 3)
            while served.service.metrics.text() == before and time.monotonic() < end:
                time.sleep(0.1)
            refused = [message for message in browser.messages if "frame" in message.lower()]
            assert bool(refused) is not asked, browser.messages
    files.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_strength_is_moved_with_the_keyboard_and_answers_stream(home, tmp_path):
    with running(home, key="a-key") as served, Browser() as browser:
        browser.open(served.url)
        browser.wait("document.getElementById('key-label')?.hidden === false", 30)
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
        browser.wait("document.getElementById('key-label')?.hidden === false", 30)
        browser.run("document.getElementById('tokens').value = 8")
        browser.run("document.getElementById('key').value = 'a-key'")
        browser.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        browser.wait("document.getElementById('steered-text')?.textContent")
        answered()
        assert text("steered") == second and browser.run("document.getElementById('prompt').value") == "<b>the</b> cat"
        refused = [message for message in browser.messages if "401" not in message]
        assert refused == [], "nothing is blocked by the page's own policy"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_tokens_are_coloured_and_pairs_become_a_vector(home, tmp_path):
    """KL follows the slider, tokens are coloured by a monitor and by what steering changed, and two labelled pairs
    are exported and trained on."""
    with running(home) as served, Browser() as browser:
        browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.open(served.url)
        browser.wait("document.querySelectorAll('.vector').length === 2", 30)
        browser.wait("document.getElementById('effect').textContent.includes('nats')")

        def text(name: str) -> str:
            return browser.run(f"document.getElementById('{name}').textContent")

        first = text("effect")
        browser.run("document.getElementById('strength-careful').focus()")
        browser.press("Home", 36)  # the opposite, as strong as the slider goes
        browser.wait(f"document.getElementById('effect').textContent !== {first!r}")

        browser.run("document.getElementById('prompt').value = 'the cat'")
        browser.run("document.getElementById('tokens').value = 8")
        browser.run("document.querySelector('button[type=submit]').click()")
        both = " && ".join(
            f"document.querySelectorAll('#{side}-text span').length > 3" for side in ("base", "steered")
        )
        browser.wait(both)
        answers = {side: text(f"{side}-text") for side in ("base", "steered")}
        assert "odd" in text("steered-state") and "late" in text("steered-state")

        # the colour says what the table says
        spans = "[...document.querySelectorAll('#steered-text span')]"
        assert not any(browser.run(f"{spans}.map((span) => span.style.background)"))
        for kind in ("change", "kl", "odd", "late"):
            browser.run(f"document.getElementById('colour').value = '{kind}'")
            browser.run("document.getElementById('colour').dispatchEvent(new Event('change'))")
            shades = browser.run(f"{spans}.map((span) => span.style.background)")
            assert all(shades) and (len({*shades}) > 1 or kind in ("odd", "late")), kind
            assert browser.run(f"{spans}.map((span) => span.textContent).join('')") == answers["steered"]
        rows = browser.run("document.querySelectorAll('#steered-tokens tbody tr').length")
        assert rows == browser.run(f"{spans}.length")

        # two labels with the keyboard, one of them taken back
        for _ in range(2):
            browser.run("document.getElementById('prefer-base').focus()")
            browser.press(" ", 32)
        assert text("pair-count") == "2"
        browser.run("document.getElementById('undo').click()")
        browser.run("document.getElementById('export').click()")
        file = tmp_path / "pairs.jsonl"
        browser.wait("true")
        while not file.is_file():
            time.sleep(0.05)
        [pair] = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        assert pair == {
            "prompt": "the cat",
            "chosen": answers["base"].strip(),
            "rejected": answers["steered"].strip(),
        }
        browser.run("document.getElementById('train').click()")
        browser.wait("document.getElementById('trained').textContent.includes('was trained on 1 pairs')", 120)
        assert browser.run("[...document.querySelectorAll('.vector label')].map((one) => one.textContent)") == [
            "careful", "mine", "warm",
        ]  # fmt: skip
        assert browser.messages == [], "nothing is blocked by the page's own policy"
