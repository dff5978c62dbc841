"""The page at ``/`` in a real browser, over real servers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from slow_server import NUM_TOKENS, SlowLLM
from starlette.applications import Starlette
from starlette.routing import Mount

from qwen_runtime import LLM, AsyncLLM
from qwen_runtime.server import ServerSettings, create_app
from qwen_runtime.server.page import render_page

Serve = Callable[[Any], AbstractContextManager[str]]

QUESTION = "What is 17 + 25?"
INJECTION = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def chrome() -> Iterator[webdriver.Chrome]:
    """A headless Chromium, which is there wherever CI runs."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "chromium and chromedriver are needed; install your system's packages of them"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


class Page:
    """The page as a user sees it."""

    def __init__(self, chrome: webdriver.Chrome, url: str) -> None:
        self.chrome = chrome
        self.url = url
        self.open()

    def open(self) -> None:
        """Load it anew, and forget what was logged before."""
        self.chrome.get(f"{self.url}/")
        self.chrome.get_log("browser")
        self.wait(lambda: self.find("health-text").text in ("Online", "Unreachable", "Loading"))

    def find(self, identity: str) -> WebElement:
        """An element by its id."""
        return self.chrome.find_element(By.ID, identity)

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """Wait until something is so."""
        return WebDriverWait(self.chrome, seconds, 0.02).until(lambda _: condition())

    def send(self, text: str) -> None:
        """Type a message and press Enter."""
        self.find("prompt").send_keys(text, Keys.ENTER)

    def texts(self, role: str) -> list[str]:
        """What the messages of a role say."""
        found = self.chrome.find_elements(By.CSS_SELECTOR, f".message.{role} .body")
        return [element.get_property("textContent") for element in found]

    def facts(self) -> list[str]:
        """What stands below the answers."""
        return [each.text for each in self.chrome.find_elements(By.CLASS_NAME, "facts")]

    def ended(self, number: int = 1) -> None:
        """Wait until so many answers have ended."""
        self.wait(lambda: len(self.facts()) == number and self.find("send").is_displayed())

    def set(self, identity: str, text: str) -> None:
        """Fill a field."""
        field = self.find(identity)
        field.clear()
        field.send_keys(text, Keys.TAB)


@pytest.fixture
def page(chrome: webdriver.Chrome, base_url: str) -> Iterator[Page]:
    """The page of the embedded model's server; it must ask no other and log nothing."""
    chrome.get_log("performance")
    opened = Page(chrome, base_url)
    yield opened
    assert problems(chrome) == []
    assert {url for url in requested(chrome) if not url.startswith(base_url)} == set()


def problems(chrome: webdriver.Chrome) -> list[str]:
    """What the browser's console shows as a warning or an error."""
    return [
        entry["message"]
        for entry in chrome.get_log("browser")
        if entry["level"] in ("WARNING", "SEVERE")
    ]


def requested(chrome: webdriver.Chrome) -> set[str]:
    """Addresses that the browser asked since they were last read."""
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    sent = (event for event in events if event["method"] == "Network.requestWillBeSent")
    found = {event["params"]["request"]["url"] for event in sent}
    return {url for url in found if not url.startswith("data:")}


def test_the_answer_streams_in_and_is_the_library_s(page: Page, embedded_llm: LLM) -> None:
    page.set("temperature", "0")
    page.send(QUESTION)
    page.ended()
    messages = [{"role": "user", "content": QUESTION}]
    expected = embedded_llm.generate(messages, do_sample=False, max_new_tokens=512)
    assert page.texts("user") == [QUESTION]
    assert page.texts("assistant") == [expected.text]
    assert page.facts()[0].startswith(f"{len(expected.token_ids)} tokens · ")
    assert page.find("announcer").get_property("textContent").startswith("Answer: ")
    assert f"{page.url}/v1/chat/completions" in requested(page.chrome)


def test_the_conversation_and_the_system_prompt_are_sent_along(
    page: Page, embedded_llm: LLM
) -> None:
    page.set("temperature", "0")
    page.set("system", "You add numbers.")
    messages = [{"role": "system", "content": "You add numbers."}]
    for number, question in enumerate((QUESTION, "What is 3 + 4?"), 1):
        page.send(question)
        page.ended(number)
        messages.append({"role": "user", "content": question})
        expected = embedded_llm.generate(messages, do_sample=False, max_new_tokens=512)
        messages.append({"role": "assistant", "content": expected.text})
    assert page.texts("assistant") == [each["content"] for each in messages[2::2]]


def test_a_limit_of_tokens_cuts_the_answer_and_says_so(page: Page) -> None:
    page.set("max-tokens", "3")
    page.send(QUESTION)
    page.ended()
    assert page.facts()[0].startswith("3 tokens")
    assert page.facts()[0].endswith("cut at the limit of tokens")


def test_a_setting_out_of_range_is_not_sent(page: Page) -> None:
    page.set("temperature", "3")
    page.send(QUESTION)
    assert page.texts("user") == []
    assert page.find("prompt").get_property("value") == QUESTION
    page.set("temperature", "1")
    page.send("")
    page.ended()


def test_markup_in_a_message_stays_text(page: Page) -> None:
    page.send(INJECTION)
    page.ended()
    assert page.texts("user") == [INJECTION]
    assert "owned" not in page.chrome.title
    assert page.chrome.find_elements(By.CSS_SELECTOR, "#messages img, #messages script") == []


def test_a_new_chat_forgets_the_old_one(page: Page) -> None:
    page.send(QUESTION)
    page.ended()
    assert not page.find("welcome").is_displayed()
    page.find("new-chat").click()
    assert page.texts("user") == page.texts("assistant") == []
    assert page.find("welcome").is_displayed()
    assert page.chrome.switch_to.active_element == page.find("prompt")
    page.chrome.find_element(By.CLASS_NAME, "idea").click()
    page.ended()
    assert page.texts("user") == [QUESTION]


def num_answers(page: Page) -> int:
    """Answers since the server's start, as the page tells."""
    return int(page.find("totals").text.split()[1].rstrip(".").replace(",", ""))


def test_the_figures_move_with_what_the_engine_does(page: Page) -> None:
    page.wait(lambda: page.find("totals").text)
    before = num_answers(page)
    page.send(QUESTION)
    page.ended()
    page.wait(lambda: num_answers(page) == before + 1)
    for tile in ("first", "inter"):
        assert float(page.find(f"tile-{tile}").text) > 0
    points = page.chrome.find_element(By.CSS_SELECTOR, ".tile polyline").get_attribute("points")
    assert len(str(points).split()) >= 2


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(page: Page) -> None:
    reached = set()
    for _ in range(20):
        active = page.chrome.switch_to.active_element
        if active.tag_name != "body":
            reached.add(active.get_attribute("id") or active.text)
            assert active.accessible_name, reached
        active.send_keys(Keys.TAB)
    expected = {"prompt", "send", "new-chat", "system", "temperature", "max-tokens", "api-key"}
    assert expected <= reached


def stop_it(page: Page, llm: LLM, stop: Callable[[], None], number: int) -> None:
    """Ask, read two looks of the growing answer, stop it, and see its slot freed."""
    page.send(QUESTION)
    page.wait(lambda: len(page.texts("assistant")) == number and page.texts("assistant")[-1])
    first = page.texts("assistant")[-1]
    page.wait(lambda: len(page.texts("assistant")[-1]) > len(first))
    assert not page.find("send").is_displayed()
    stop()
    page.ended(number)
    assert page.facts()[-1] == "stopped"
    page.wait(lambda: llm.stats().num_running == 0, 2)


def test_an_answer_is_read_while_it_grows_and_stops_when_told_to(
    chrome: webdriver.Chrome, serve: Serve, embedded_llm: LLM
) -> None:
    with serve(create_app(SlowLLM(embedded_llm))) as url:
        page = Page(chrome, url)
        stop_it(page, embedded_llm, lambda: page.find("stop").click(), 1)
        stop_it(page, embedded_llm, lambda: page.find("prompt").send_keys(Keys.ESCAPE), 2)
        assert embedded_llm.stats().num_waiting == 0
        text = page.texts("assistant")[-1]
        time.sleep(0.2)
        assert page.texts("assistant")[-1] == text
        assert len(text) < 10 * NUM_TOKENS
        assert not page.find("banner").is_displayed()


def test_a_key_is_asked_for_and_kept_for_the_tab_only(
    chrome: webdriver.Chrome, serve: Serve, async_llm: AsyncLLM
) -> None:
    settings = ServerSettings(api_keys=("sesame",), protect_metrics=True)
    with serve(create_app(async_llm, settings)) as url:
        page = Page(chrome, url)
        page.wait(lambda: page.find("banner").is_displayed())
        assert "must carry one of the server's API keys" in page.find("banner-text").text
        assert page.find("live-note").text == "needs the API key"
        page.send(QUESTION)
        page.wait(lambda: page.find("banner-text").text.startswith("No answer: a request must"))
        assert page.find("prompt").get_property("value") == QUESTION
        page.set("api-key", "sesame")
        page.wait(lambda: not page.find("banner").is_displayed())
        page.find("prompt").send_keys(Keys.ENTER)
        page.ended()
        page.wait(lambda: page.find("totals").text)
        stored = "return JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])"
        assert chrome.execute_script(stored) == '[{"qwen-run-api-key":"sesame"},{},""]'
        chrome.refresh()
        assert page.find("api-key").get_property("value") == "sesame"
        chrome.execute_script("sessionStorage.clear()")


def test_a_refusal_shows_as_a_banner_and_gives_the_message_back(
    chrome: webdriver.Chrome, serve: Serve, async_llm: AsyncLLM
) -> None:
    app = create_app(async_llm)
    with serve(app) as url:
        page = Page(chrome, url)
        assert asyncio.run(app.state.lifecycle.drain(0))
        page.send(QUESTION)
        page.wait(lambda: page.find("banner").is_displayed())
        assert page.find("banner-text").text.startswith("No answer: the server is stopping")
        assert page.texts("user") == []
        assert page.find("prompt").get_property("value") == QUESTION
        page.find("banner-close").click()
        assert not page.find("banner").is_displayed()
    page.wait(lambda: page.find("health-text").text == "Unreachable")
    page.find("prompt").send_keys(Keys.ENTER)
    page.wait(lambda: page.find("banner").is_displayed())
    assert page.find("banner-text").text == "No answer: the server cannot be reached"


def test_the_page_works_below_a_prefix(
    chrome: webdriver.Chrome, serve: Serve, async_llm: AsyncLLM
) -> None:
    with serve(Starlette(routes=[Mount("/models/tiny", create_app(async_llm))])) as url:
        page = Page(chrome, f"{url}/models/tiny")
        page.send(QUESTION)
        page.ended()
        assert page.texts("assistant") != [""]
        page.wait(lambda: page.find("totals").text)
        assert problems(chrome) == []


def test_the_page_is_one_document_that_runs_only_its_own_script(base_url: str) -> None:
    answer = httpx.get(f"{base_url}/")
    document, policy = render_page()
    assert answer.text == document
    assert answer.headers["content-security-policy"] == policy
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    outside = re.findall(r'(?:src|href|action)="(?!data:|#)([^"]*)"', document)
    assert outside == []
    assert "innerHTML" not in document
    assert httpx.get(f"{base_url}/").headers["x-content-type-options"] == "nosniff"


def test_there_is_no_page_where_none_is_wanted(serve: Serve, async_llm: AsyncLLM) -> None:
    with serve(create_app(async_llm, ServerSettings(page=False))) as url:
        assert httpx.get(f"{url}/").status_code == 404
