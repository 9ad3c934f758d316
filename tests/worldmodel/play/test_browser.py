"""The page in a real browser, against a real server: Debian's Chromium, driven by Playwright.

Screenshots go to the folder that GOLF_SCREENSHOTS names (pytest's own folder otherwise), to be looked at.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import uvicorn
from PIL import Image, ImageSequence

from worldmodel.play.server import make_app
from worldmodel.play.start import PlayConfig, make_host

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def address():
    """A server of the packaged world, stopped and started by nobody else."""
    from contextlib import ExitStack

    faults: list[BaseException] = []
    with ExitStack() as stack, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        host = make_host(PlayConfig(max_players=3, record_s=4.0), stack)
        app = make_app(host, ["127.0.0.1"], faults.append)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="websockets-sansio", lifespan="on"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        for _ in range(600):
            if server.started:
                break
            time.sleep(0.05)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30)
    assert not faults


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def shots(tmp_path) -> Path:
    folder = Path(os.environ.get("GOLF_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(chromium, address):
    """A page that has begun to play; every request must go to our server and nothing may be complained about."""
    context = chromium.new_context(viewport={"width": 1000, "height": 1150})
    page = context.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    playwright.expect(page.locator("#connection")).to_have_text("connected", timeout=PATIENCE_MS)
    page.locator("#frame").wait_for()
    yield page
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    assert not [text for text in complaints if "ERR_INTERNET_DISCONNECTED" not in text], complaints
    context.close()


def pixels(page, name: str) -> np.ndarray:
    """What a canvas shows, (H, W, 4) uint8."""
    height, width, data = page.locator(name).evaluate(
        "c => [c.height, c.width, Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]"
    )
    return np.asarray(data, np.uint8).reshape(height, width, 4)


def frame_number(page) -> int:
    return int(page.locator("#frame").text_content())


def wait_for_frame(page, number: int) -> None:
    for _ in range(600):
        if frame_number(page) >= number:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"frame {number} did not come; still at {frame_number(page)}")


def one_frame_on(page) -> None:
    before = frame_number(page)  # read first: the frame may come faster than the next line
    page.keyboard.press(".")
    wait_for_frame(page, before + 1)


def test_dream_and_real_game_side_by_side_and_keys_change_them(page, shots):
    page.keyboard.press("p")
    playwright.expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    page.locator("#reset").click()
    page.wait_for_timeout(500)
    start = pixels(page, "#dream")
    assert start[..., :3].std() > 5
    finals = []
    for key in ("ArrowRight", "ArrowLeft"):
        page.locator("#reset").click()
        page.keyboard.down(key)
        page.locator("#dream").focus()
        for _ in range(12):
            one_frame_on(page)
        page.screenshot(path=shots / f"held_{key}.png", full_page=True)
        finals.append((pixels(page, "#dream"), pixels(page, "#real")))
        page.keyboard.up(key)
    (right, right_real), (left, left_real) = finals
    for one, other in ((right, start), (right, left), (right_real, left_real)):
        assert np.abs(one.astype(int) - other).mean() > 2
    if page.locator("#real-off").is_hidden():  # the dream follows the real game better than the other run's
        assert np.abs(right.astype(int) - right_real).mean() < np.abs(right.astype(int) - left_real).mean()
    page.keyboard.press(",")
    page.wait_for_timeout(800)
    assert frame_number(page) == 3  # back at the prompt


def test_live_figures_and_uncertainty_are_shown(page, shots):
    page.keyboard.down("ArrowRight")
    wait_for_frame(page, 20)
    page.keyboard.up("ArrowRight")
    page.wait_for_timeout(1500)
    page.screenshot(path=shots / "figures.png", full_page=True)
    assert float(page.locator("#rate").text_content()) > 0
    assert page.locator("#p95").text_content().endswith(" ms")
    assert "bits a token" in page.locator("#entropy").text_content()
    assert pixels(page, "#strip")[..., 3].any()


def test_all_is_done_by_keyboard_and_every_control_has_a_name(page):
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('button, select, input, canvas')].filter(e => !(e.ariaLabel || "
        "e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert nameless == []
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.textContent"))
    wanted = {"dream", "pause", "step", "rewind", "reset", "resync", "clip", "pilot", "temperature", "decode", "fps",
              "record", "format", "7: right"}  # fmt: skip
    if not page.locator("#real-off").is_hidden():
        wanted.discard("resync")
    assert wanted <= reached
    page.locator("#actions button", has_text="7: right").focus()
    page.keyboard.down("Enter")
    playwright.expect(page.locator("#actions button", has_text="7: right")).to_have_attribute(
        "aria-pressed", "true", timeout=PATIENCE_MS
    )
    page.keyboard.up("Enter")


def test_settings_pilot_and_clip_reach_the_server(page, shots):
    page.locator("#temperature").fill("0.8")
    page.locator("#temperature").press("Tab")
    page.locator("#decode").fill("99")
    page.locator("#decode").press("Tab")
    playwright.expect(page.locator("#notice")).to_contain_text("expected 1 to 16")
    page.locator("#decode").fill("1")
    page.locator("#decode").press("Tab")
    page.locator("#pilot").select_option("random")
    page.locator("#clip").select_option("4")
    wait_for_frame(page, 30)
    page.screenshot(path=shots / "random_pilot.png", full_page=True)
    playwright.expect(page.locator("#clip")).to_have_value("4")
    playwright.expect(page.locator("#connection")).to_have_text("connected")
    pressed = set()
    for _ in range(30):
        pressed.add(page.locator("#actions button[aria-pressed=true]").first.text_content())
        page.wait_for_timeout(50)
    assert len(pressed) > 2


def test_the_controls_are_handed_over_and_back(page, shots):
    page.locator("#pilot").select_option("sticky-right")
    playwright.expect(page.locator("#notice")).to_be_empty()
    page.keyboard.press("h")
    playwright.expect(page.locator("#pilot")).to_have_value("human")
    page.keyboard.press("h")  # the policy that was there last
    playwright.expect(page.locator("#pilot")).to_have_value("sticky-right")
    page.locator("#dream").focus()
    page.keyboard.press("ArrowLeft")
    playwright.expect(page.locator("#notice")).to_contain_text("sticky-right is at the controls; H gives them to you")
    page.screenshot(path=shots / "policy.png", full_page=True)
    page.keyboard.press("h")
    playwright.expect(page.locator("#notice")).to_be_empty()


def test_arrows_steer_again_after_a_setting(page):
    page.locator("#temperature").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("0.5")
    page.keyboard.press("p")  # letters are no numbers: they are keys of the game here too
    playwright.expect(page.locator("#pause")).to_have_text("Go on (P)")
    page.keyboard.press("p")
    page.keyboard.press("Enter")
    page.keyboard.down("ArrowRight")
    held = page.locator("#actions button", has_text="7: right")
    playwright.expect(held).to_have_attribute("aria-pressed", "true", timeout=PATIENCE_MS)
    page.keyboard.up("ArrowRight")
    playwright.expect(page.locator("#temperature")).to_have_value("0.5")
    page.keyboard.press(" ")
    playwright.expect(page.locator("#pause")).to_have_text("Go on (P)")
    page.keyboard.press(" ")
    playwright.expect(page.locator("#pause")).to_have_text("Pause (P)")


def test_a_hot_dream_is_less_sure_and_rewinding_shows_what_was(page, shots):
    wait_for_frame(page, 30)
    page.keyboard.press("p")
    playwright.expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(500)
    at, picture = frame_number(page), pixels(page, "#dream")
    for _ in range(3):
        one_frame_on(page)
    page.keyboard.press(",")  # back 15: further than the three steps
    page.wait_for_function(f"() => Number(document.getElementById('frame').textContent) === {at + 3 - 15}")
    while frame_number(page) < at:  # the same actions (none), the same noise: the same dream
        one_frame_on(page)
    np.testing.assert_array_equal(pixels(page, "#dream"), picture)
    cool = float(page.locator("#entropy").text_content().split()[0])
    page.locator("#temperature").fill("5")
    page.locator("#temperature").press("Enter")
    page.keyboard.press("p")
    playwright.expect(page.locator("#drift")).to_be_visible(timeout=PATIENCE_MS)
    page.screenshot(path=shots / "drifting.png", full_page=True)
    assert float(page.locator("#entropy").text_content().split()[0]) > cool
    page.keyboard.press("r")
    playwright.expect(page.locator("#drift")).to_be_hidden(timeout=PATIENCE_MS)


def test_a_second_player_has_a_game_of_its_own(page, chromium, address, shots):
    other = chromium.new_context().new_page()
    other.goto(address)
    playwright.expect(other.locator("#players")).to_have_text("2 of 3", timeout=PATIENCE_MS)
    playwright.expect(page.locator("#players")).to_have_text("2 of 3")
    page.keyboard.press("p")
    playwright.expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true", timeout=PATIENCE_MS)
    mine, theirs = frame_number(page), frame_number(other)
    wait_for_frame(other, theirs + 10)
    assert frame_number(page) == mine
    other.screenshot(path=shots / "second_player.png", full_page=True)
    other.context.close()
    playwright.expect(page.locator("#players")).to_have_text("1 of 3", timeout=PATIENCE_MS)


def test_a_dropped_connection_comes_back_to_the_same_game(page, shots):
    wait_for_frame(page, 15)
    page.keyboard.press("p")
    playwright.expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    at, picture = frame_number(page), pixels(page, "#dream")
    page.evaluate("() => socket.close(4000, 'cut by the test')")
    playwright.expect(page.locator("#connection")).to_contain_text("trying again")
    page.screenshot(path=shots / "dropped.png", full_page=True)
    playwright.expect(page.locator("#connection")).to_have_text("connected", timeout=PATIENCE_MS)
    page.wait_for_timeout(500)
    assert frame_number(page) == at
    np.testing.assert_array_equal(pixels(page, "#dream"), picture)
    page.keyboard.press("p")
    wait_for_frame(page, at + 5)


@pytest.mark.parametrize("form", ["mp4", "gif"])
def test_a_recording_downloads(page, shots, form):
    page.locator("#format").select_option(form)
    page.locator("#dream").focus()
    page.keyboard.press("l")
    wait_for_frame(page, frame_number(page) + 20)
    page.keyboard.press("l")
    link = page.locator("#download a")
    link.wait_for(timeout=PATIENCE_MS)
    with page.expect_download() as download:
        link.click()
    path = shots / f"recording.{form}"
    download.value.save_as(path)
    film = iio.imread(path, index=None)
    if form == "mp4":
        assert len(film) >= 15
    else:  # equal pictures are one that lasts longer
        with Image.open(path) as gif:
            assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif)) >= 15 * 60
    assert film.shape[1] == {"mp4": 256, "gif": 128}[form]
    assert film.std() > 5
    page.screenshot(path=shots / f"recorded_{form}.png", full_page=True)
