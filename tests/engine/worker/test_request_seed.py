"""What the random scores of a request depend on: what it asks, and not how it is called."""

from types import SimpleNamespace
from typing import Any

import pytest

from sparsemm_vllm.engine.worker.model_state import request_seed


def request(name: str = "a", prompt: tuple[int, ...] = (5, 6), pictures: str = "xy") -> Any:
    features = [SimpleNamespace(identifier=picture) for picture in pictures]
    return SimpleNamespace(req_id=name, prompt_token_ids=list(prompt), mm_features=features)


def test_its_name_makes_no_difference() -> None:
    assert request_seed(request("a")) == request_seed(request("b")) < 2**64


@pytest.mark.parametrize("change", [{"prompt": (5, 7)}, {"pictures": "xz"}, {"pictures": "yx"}])
def test_what_it_asks_makes_one(change: dict[str, Any]) -> None:
    assert request_seed(request()) != request_seed(request(**change))
