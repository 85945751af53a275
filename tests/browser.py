"""A real Chromium before a page, with the words in which a test looks at it."""

import contextlib
import importlib.util
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --force-prefers-reduced-motion --window-size=1280,900"
)
ENTER = "\ue007"
ESCAPE = "\ue00c"
SHIFT_ENTER = "\ue008\ue007\ue008"


def missing() -> str | None:
    """Why no browser can be driven here; None if one can."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "needs chromium and chromedriver on the path"
    if importlib.util.find_spec("selenium") is None:
        return "needs selenium"
    return None


@contextlib.contextmanager
def driving(folder: pathlib.Path) -> Iterator[Any]:
    """A browser with a profile in an empty folder."""
    webdriver = importlib.import_module("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in _FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={folder}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    found = webdriver.Chrome(options=options, service=service)
    try:
        yield found
    finally:
        found.quit()


class Page:
    """What a person does with the page, and what a test looks at."""

    def __init__(self, driver: Any, address: str, state: Any = None) -> None:
        """A page.

        Args:
            driver: Of `driving`.
            address: Root of its server, without a slash at the end.
            state: Of a made-up server.
        """
        self.driver = driver
        self.address = address
        self.state = state

    def open(self, view: str = "") -> "Page":
        self.driver.get(f"{self.address}/{view}")
        self.until(lambda: self.text("#state") not in ("", "connecting"))
        return self

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def shown(self, selector: str) -> bool:
        return bool(self.find(selector).is_displayed())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def run_async(self, script: str, *arguments: Any) -> Any:
        """The result of an async function's body; modules are found under /page/."""
        return self.driver.execute_async_script(
            f"const done = arguments[arguments.length - 1]; (async (...given) => {{ {script} }})"
            "(...[...arguments].slice(0, -1)).then(done, (e) => done(`failed: ${e}`));",
            *arguments,
        )

    def until(self, holds: Callable[[], Any], timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < end, "what the test waits for did not come"
            time.sleep(0.02)

    def say(self, text: str) -> None:
        """Sends, and waits for the end of the answer."""
        self.find("#text").clear()
        self.find("#text").send_keys(text, ENTER)
        self.until(lambda: self.find("#send").is_displayed())

    def choose(self, mode: str) -> None:
        self.run("document.querySelector(`input[value=${arguments[0]}]`).click()", mode)

    def emulate(self, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )

    def complaints(self) -> list[Any]:
        """What the browser had to say of scripts and styles since it was last asked."""
        return [
            entry
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING") and entry["source"] != "network"
        ]
