"""What every test of an integration may ask for; a file that needs another `pair` has its own."""

from typing import Any

import pytest

from tests import models
from tests.integrations.agreement import attached


@pytest.fixture(scope="module", params=models.VARIED)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A stock model and its attached twin."""
    stock = models.build(request.param)
    return stock, attached(stock)
