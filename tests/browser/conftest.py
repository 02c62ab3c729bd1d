"""One Chromium for all browser tests of a worker."""

import pytest

from .pages import chromium


@pytest.fixture(scope="session")
def browser():
    with chromium() as running:
        yield running
