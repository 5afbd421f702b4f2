"""The page of a run in headless Chromium: it is clicked, filtered, sorted and looked at."""

import io
import os
import re
import shutil
import time

import numpy as np
import pytest
from folders_of_runs import HOSTILE, PLAIN, folder_of_run
from PIL import Image

from pisces_rl.run_page import write_page

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMES = "[...player.near].map((video) => video.currentTime)"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        try:
            launched = driver.chromium.launch(executable_path=CHROMIUM)
        except playwright.Error as error:
            pytest.skip(f"no Chromium on this machine: {str(error).splitlines()[0]}")
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = folder_of_run(tmp_path_factory.mktemp("runs") / "run", [*PLAIN, *HOSTILE], shown=8)
    write_page([folder])
    return folder


@pytest.fixture
def opened(browser):
    """Open a page; at the end check that it made no network request, no script failed and no prompt was executed."""
    asked, failed, contexts = [], [], []

    def open_page(path, wait=True, **settings):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | settings))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(10_000)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: failed.append(str(error)))
        tab.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
        tab.on("dialog", lambda dialog: (failed.append(dialog.message), dialog.dismiss()))
        tab.goto(path.as_uri())
        if wait:
            until(tab, "player.duration > 0 && [...player.near].every((video) => video.readyState > 1)")
        return tab

    yield open_page
    broken = [tab.evaluate("'broken' in window") for context in contexts for tab in context.pages]
    for context in contexts:
        context.close()
    assert not failed and not any(broken)
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)


def until(tab, condition: str, seconds: float = 15) -> None:
    """The page's policy lets no driver evaluate a text inside it again and again, so that is done from here."""
    end = time.monotonic() + seconds
    while not tab.evaluate(condition):
        assert time.monotonic() < end, f"{condition} did not come true"
        time.sleep(0.02)


def picture(target) -> np.ndarray:
    """The screen's pixels, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(target.screenshot())).convert("RGB"), dtype=float)


def titles(tab) -> list[str]:
    return tab.eval_on_selector_all(".card h3", "(all) => all.map((one) => one.textContent)")


def settled(tab) -> list[float]:
    """Times of the players once none of them seeks."""
    until(tab, "[...player.near].every((video) => !video.seeking)")
    return tab.evaluate(TIMES)


def test_play_scrub_and_keys_move_all_players(opened, run):
    tab = opened(run / "report.html")
    play = tab.get_by_role("button", name="Play all")
    assert play.get_attribute("aria-pressed") == "false" and set(settled(tab)) == {0}
    play.click()
    until(tab, "player.time > 0.2 && player.near.size > 8 && [...player.near].every((video) => video.currentTime > 0)")
    assert tab.locator("#play").get_attribute("aria-pressed") == "true" and "Pause" in tab.inner_text("#play")
    tab.locator("#play").click()
    paused = settled(tab)
    assert max(paused) - min(paused) < 1e-3 and paused[0] * 8 == pytest.approx(round(paused[0] * 8), abs=8e-3)

    tab.locator("#scrub").fill("0.5")
    assert settled(tab) == pytest.approx([0.5] * len(paused), abs=1e-3)
    tab.locator("#scrub").blur()
    tab.keyboard.press("ArrowRight")
    assert settled(tab) == pytest.approx([0.625] * len(paused), abs=1e-3)
    tab.locator("#scrub").focus()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("End")
    assert min(settled(tab)) == pytest.approx(1.875, abs=2e-3)
    tab.keyboard.press("Home")
    assert max(settled(tab)) == 0
    tab.locator("#speed").select_option("2")
    tab.locator("#speed").blur()
    tab.keyboard.press(" ")
    until(tab, "player.time > 0.1")
    assert tab.evaluate("[...player.near].every((video) => video.playbackRate === 2)")
    tab.keyboard.press(" ")
    assert not tab.evaluate("player.playing")


@pytest.mark.slow
def test_what_the_screen_shows_is_the_videos(opened, run):
    """Red before, green after, brighter at the end; both drawn."""
    tab = opened(run / "report.html")
    before, after = (tab.locator("video").nth(i) for i in (0, 1))
    settled(tab)
    first = [picture(video).mean((0, 1)) for video in (before, after)]
    tab.locator("#scrub").fill("1.875")
    settled(tab)
    tab.wait_for_timeout(200)  # a frame is painted after its seek
    last = [picture(video).mean((0, 1)) for video in (before, after)]
    assert [int(mean.argmax()) for mean in (*first, *last)] == [0, 1, 0, 1]
    assert last[0][0] > first[0][0] + 60 and last[1][1] > first[1][1] + 60
    chart = picture(tab.locator(".chart svg").first)
    assert (chart.max(-1) - chart.min(-1) > 60).sum() > 50  # a coloured curve on grey


def test_filters_and_sorts(opened, run):
    tab = opened(run / "report.html")
    everything = titles(tab)
    assert everything == [*PLAIN, *HOSTILE]
    tab.get_by_role("combobox", name="Sort", exact=True).select_option(label="change: worst first")
    assert titles(tab) == [HOSTILE[-1], *([*PLAIN, *HOSTILE][-2::-1])]
    tab.get_by_role("combobox", name="Sort", exact=True).select_option(label="change: best first")
    assert titles(tab) == everything
    tab.get_by_role("combobox", name="Sort", exact=True).select_option(label="score after: highest first")
    last = "(all) => all.map((one) => Number([...one.querySelectorAll('b')].at(-1).textContent))"
    after = tab.eval_on_selector_all(".card", last)
    assert after == sorted(after, reverse=True) and len(after) == 8
    tab.get_by_role("combobox", name="Change", exact=True).select_option("worse")
    assert titles(tab) == [HOSTILE[-1]] and "1 of 8 prompts" in tab.locator("#count").inner_text()
    tab.get_by_role("button", name="Reset").click()
    tab.get_by_label("Prompt contains").fill("RED SQ")
    assert titles(tab) == ["a red square"]
    tab.get_by_label("Prompt contains").fill("</script>")
    assert titles(tab) == [HOSTILE[0]]
    tab.get_by_role("button", name="Reset").click()
    tab.get_by_label("Score from").fill("0.64")
    tab.get_by_label("Score to").fill("0.76")
    assert titles(tab) == HOSTILE[:3]
    tab.get_by_label("Prompt contains").fill("no such prompt")
    assert titles(tab) == [] and tab.locator("#count").inner_text().startswith("0 of 8")
    tab.get_by_role("button", name="Reset").click()
    tab.get_by_role("combobox", name="After", exact=True).select_option("0")
    assert "evaluated, step 0" in tab.locator("figcaption").first.inner_text() and tab.locator("video").count() == 8


def test_hostile_texts_are_text(opened, run):
    tab = opened(run / "report.html")
    assert titles(tab)[len(PLAIN) :] == HOSTILE and tab.locator("img").count() == 0
    long = tab.locator(".card").last
    height = long.bounding_box()["height"]
    long.get_by_role("button", name="full prompt").click()
    assert long.bounding_box()["height"] > height + 200
    arabic = tab.locator(".card h3").nth(len(PLAIN) + 3)
    assert arabic.evaluate("(one) => getComputedStyle(one).direction") == "rtl"


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_a_phone_and_is_dark_where_asked(opened, run, width):
    shown = {}
    for scheme in ("light", "dark"):
        tab = opened(run / "report.html", viewport={"width": width, "height": 740}, color_scheme=scheme)
        tab.eval_on_selector_all("details", "(all) => all.forEach((one) => { one.open = true; })")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        wide = """[...document.querySelectorAll('main *')].filter((one) => !one.closest('.scroll, svg')
            && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
        assert tab.evaluate(wide) == []
        shown[scheme] = picture(tab)
        heights = tab.eval_on_selector_all("button, select", "(all) => all.map((one) => one.offsetHeight)")
        assert all(height == 0 or height >= 24 for height in heights)
    assert shown["light"].mean() > 180 and shown["dark"].mean() < 75


@pytest.mark.slow
def test_the_keyboard_reaches_everything(opened, run):
    tab = opened(run / "report.html")
    reached = []
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id || document.activeElement.tagName"))
    order = [reached.index(name) for name in ("play", "scrub", "speed", "set", "prompt", "score", "sort", "change")]
    assert order == sorted(order)
    tab.locator("#play").focus()
    tab.keyboard.press("Tab")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    named = "one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim()"
    all_of_them = "[...document.querySelectorAll('input, select, button, video, svg:not([aria-hidden])')]"
    nameless = f"{all_of_them}.filter((one) => !({named}))"
    assert tab.evaluate(f"{nameless}.length") == 0
    chart = tab.locator(".chart").first
    chart.locator("svg").focus()
    tab.keyboard.press("Home")
    assert re.match(r"step 0: ", chart.locator(".read").inner_text())


@pytest.mark.slow
def test_reduced_motion_plays_videos_once(opened, run):
    tab = opened(run / "report.html", reduced_motion="reduce")
    tab.locator("#speed").select_option("2")
    tab.locator("#play").click()
    until(tab, "!player.playing")
    assert tab.evaluate("player.time") == pytest.approx(1.875)


@pytest.mark.slow
def test_several_runs_side_by_side(opened, tmp_path):
    folders = [folder_of_run(tmp_path / name, gain=gain) for name, gain in (("a #1", 0.5), ("b", -0.2))]
    tab = opened(write_page(folders, tmp_path / "comparison.html"))
    first = tab.locator(".card").first
    assert first.locator(".run-name").all_inner_texts() == ["a #1", "b"] and first.locator("video").count() == 4
    assert tab.locator(".chart").filter(has_text="judges/true").first.locator("path.curve").count() == 2
    assert tab.locator("#legend").inner_text().split("\n") == ["a #1", "b"]
    tab.get_by_role("combobox", name="Sort", exact=True).select_option(label="change: worst first")
    of_first = titles(tab)
    tab.get_by_role("combobox", name="Sort and filter by run", exact=True).select_option(label="b")
    assert titles(tab) != of_first
    tab.get_by_label("include defaults").check()
    tab.get_by_label("only differences").check()
    assert tab.locator("#setting-table tbody tr").all_inner_texts() == ["output_dir\ta #1\tb"]


@pytest.mark.slow
def test_the_page_is_one_self_contained_file(opened, tmp_path):
    folder = folder_of_run(tmp_path / "run")
    page = write_page([folder], tmp_path / "alone.html", one_file=True)
    shutil.rmtree(folder)
    tab = opened(page)
    assert tab.locator("video").count() == 4 and tab.locator(".no-video").count() == 0
    tab.locator("#scrub").fill("1")
    assert settled(tab) == pytest.approx([1] * 4, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["videos", "evaluations", "everything"])
def test_a_run_that_lacks_a_part_has_a_page(opened, tmp_path, lacks):
    folder = folder_of_run(tmp_path / "run", shown=0)
    if lacks != "videos":
        shutil.rmtree(folder / "evaluations")
        os.unlink(folder / "report.json")
    if lacks == "everything":
        (folder / "run.json").unlink()
    tab = opened(write_page([folder]), wait=False)
    count = {"videos": "3 of 3 prompts; none has a video."}.get(lacks, "No evaluations or samples yet.")
    assert tab.locator("#count").inner_text() == count
    assert tab.locator(".chart").count() == {"videos": 7, "evaluations": 4, "everything": 0}[lacks]
