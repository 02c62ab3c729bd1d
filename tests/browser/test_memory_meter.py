"""The live memory meter in the real front end: absent and silent by default, right when on, silent when hidden."""

import pytest

from .pages import FrontEnd

ROUTE = "/apple_silicon_video/memory"
METER = ".asv-memory-meter"
HIDE = """hidden => {
    Object.defineProperty(document, 'hidden', {value: hidden, configurable: true})
    document.dispatchEvent(new Event('visibilitychange'))
}"""


@pytest.mark.slow
def test_meter(comfy, browser):
    figures = comfy.get(ROUTE)
    assert figures["process"] > 1e8 and figures["total"] > figures["available"] > 0 and figures["driver"] is None
    with FrontEnd(browser, comfy.url) as front_end:
        page, asked = front_end.page, []
        page.on("request", lambda request: asked.append(request.url) if ROUTE in request.url else None)
        page.wait_for_timeout(2500)
        assert asked == [] and page.locator(METER).count() == 0

        page.evaluate("window.app.extensionManager.setting.set('AppleSiliconVideo.MemoryMeter', true)")
        page.wait_for_function(f"document.querySelector('{METER} span')?.textContent.includes('Process')")
        text = page.locator(METER).inner_text()
        assert "GiB of" in text and "swap" in text
        for _ in range(2):
            page.wait_for_event("request", lambda request: ROUTE in request.url)

        page.evaluate(HIDE, True)
        page.wait_for_timeout(500)
        count = len(asked)
        page.wait_for_timeout(4500)
        assert len(asked) == count
        with page.expect_request(lambda request: ROUTE in request.url):
            page.evaluate(HIDE, False)

        page.evaluate("window.app.extensionManager.setting.set('AppleSiliconVideo.MemoryMeter', false)")
        page.wait_for_timeout(500)
        count = len(asked)
        page.wait_for_timeout(2500)
        assert len(asked) == count and not page.locator(METER).is_visible()
        assert front_end.errors == []
