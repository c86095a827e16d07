"""What every test of an integration may ask for; a file that needs another of these has its own."""

from typing import Any

import pytest
import torch

import tandemkv.integrations.transformers as tandem
from tests import models
from tests.integrations.agreement import HELD, IDS, attached, tiered


@pytest.fixture(scope="module", params=models.VARIED)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A stock model and its attached twin."""
    stock = models.build(request.param)
    return stock, attached(stock)


@pytest.fixture(scope="module")
def stock() -> Any:
    return models.llama()


@pytest.fixture
def ours(stock: Any) -> Any:
    return attached(stock)


@pytest.fixture
def cache(ours: Any) -> tandem.TieredCache:
    """A cache in use: 70 tokens, two of three pages far."""
    cache = tiered(ours)
    with torch.no_grad():
        ours(IDS[:, :HELD], past_key_values=cache)
    assert cache.use()[1].used_bytes > 0
    return cache
