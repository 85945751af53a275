"""A browser, and the page in it; without a browser these tests are skipped."""

from collections.abc import Iterator
from typing import Any

import browser
import page_server
import pytest


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    reason = browser.missing()
    if reason is not None:
        pytest.skip(reason)
    with browser.driving(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def page(driver: Any) -> Iterator[browser.Page]:
    """The page before the server of `page_server`."""
    state = page_server.FakeState()
    with page_server.run_server(state) as address:
        found = browser.Page(driver, address, state)
        found.emulate()
        yield found
        complaints = found.complaints()
        driver.get("about:blank")
    assert complaints == []
