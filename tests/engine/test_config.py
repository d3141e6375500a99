"""What a configuration says is worked out once, and again when its settings change."""

from types import SimpleNamespace
from typing import Any

import pytest

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.engine import config as config_module
from sparsemm_vllm.engine.config import Serving


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Budgets of the layouts that were made, in order."""
    budgets: list[int] = []

    def build_layout(vllm_config: Any, settings: Settings) -> CacheLayout:
        budgets.append(settings.budget)
        return CacheLayout(((3, 98), (0, 16)), window=8, base=settings.budget - 8)

    monkeypatch.setattr(config_module, "build_layout", build_layout)
    return budgets


def configuration(budget: int) -> Any:
    return SimpleNamespace(additional_config={"sparsemm": {"budget": budget, "window": 8}})


def test_it_is_made_once(made: list[int]) -> None:
    config = configuration(40)
    first = Serving.of(config)
    assert Serving.of(config) is first
    assert made == [40]
    assert (first.settings.budget, first.layout.base, first.limits.largest_budget) == (40, 32, 80)


def test_other_settings_are_another_one(made: list[int]) -> None:
    """As where the head profile takes the place of its name."""
    config = configuration(40)
    before = Serving.of(config)
    config.additional_config = configuration(50).additional_config
    assert Serving.of(config).settings.budget == 50
    assert Serving.of(config) is not before
    assert made == [40, 50]
