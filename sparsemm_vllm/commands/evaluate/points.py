"""What is compared: methods with budgets, and models with some of their heads silenced."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.commands.evaluate.errors import EvalError

DENSE = "full"
BY_HEAD_SCORES = ("sparsemm", "random_heads")  # others give no head more than a prompt has
MASKS = ("visual", "random")


@dataclass(frozen=True)
class Point:
    """One engine configuration.

    Attributes:
        method: see `METHODS`.
        budget: tokens per KV head on average; none for the dense cache.
        redistribute: give what heads cannot use to the others.
        mask: which query heads are silenced, of `MASKS`, if any.
        draw: of random ones.
        heads: that are silenced: layer and query head.
    """

    method: str
    budget: int | None = None
    redistribute: bool = False
    mask: str | None = None
    draw: int | None = None
    heads: tuple[tuple[int, int], ...] = ()

    @property
    def curve(self) -> str:
        """What points have in common that differ in their budget, or in their draw, only."""
        if self.mask:
            return f"{self.mask} heads masked"
        return self.method + ("+redistribute" if self.redistribute else "")

    @property
    def name(self) -> str:
        """For people and files."""
        parts = [self.curve.replace(" ", "-"), self.budget, self.draw]
        return "-".join(str(part) for part in parts if part is not None)

    def settings(self, shared: dict[str, Any]) -> dict[str, Any]:
        """SPARSEMM's settings, checked.

        Args:
            shared: settings of all points.

        Raises:
            SettingsError: for a method or a budget that a server would refuse.
        """
        own: dict[str, Any] = {"method": self.method, "redistribute": self.redistribute}
        if self.budget is not None:
            own["budget"] = self.budget
        else:
            own["budget"] = max(2, shared["window"] + 1)  # allowed, and of no consequence
        if self.heads:
            own["mask_heads"] = [list(head) for head in self.heads]
        settings = shared | own
        Settings.from_additional_config({"sparsemm": settings})
        return settings


def method_points(
    methods: Iterable[str], budgets: Iterable[int], redistribute: bool
) -> list[Point]:
    """Each method with each budget; those that heads' scores tell apart with redistribution too.

    Raises:
        EvalError: for a method or a budget that is named twice.
    """
    points = []
    for method in methods:
        if method == DENSE:
            continue
        kinds = [False, True] if redistribute and method in BY_HEAD_SCORES else [False]
        points += [Point(method, budget, kind) for kind in kinds for budget in sorted(budgets)]
    for index, point in enumerate(points):
        if point in points[:index]:
            raise EvalError(f"{point.method} with a budget of {point.budget} stands there twice")
    return points


def mask_points(profile: HeadProfile, share: float, masks: list[str], draws: int) -> list[Point]:
    """The dense model with the best visual heads silenced, and with as many random others.

    Args:
        profile: whose scores say which heads are visual.
        share: of all query heads, 0 to 1; at least one head is silenced.
        masks: of `MASKS`.
        draws: of random heads.

    Raises:
        EvalError: for another kind of mask, a share out of range, or no draws.
    """
    for mask in masks:
        if mask not in MASKS:
            raise EvalError(f"unknown mask {mask!a}; known: {', '.join(MASKS)}")
    if not 0 < share <= 0.5:
        raise EvalError(f"--mask-heads is {share:.0%}; it must lie above 0 % and up to 50 %")
    if draws < 1:
        raise EvalError(f"--draws is {draws}; it must be at least 1")
    scores = np.array(profile.scores)
    order = np.argsort(-scores, axis=None, kind="stable")
    count = max(1, round(share * scores.size))
    points = []
    if "visual" in masks:
        points.append(Point(DENSE, mask="visual", heads=_heads(order[:count], scores.shape)))
    if "random" in masks:
        for draw in range(draws):
            others = np.random.default_rng(draw).choice(order[count:], count, replace=False)
            heads = _heads(others, scores.shape)
            points.append(Point(DENSE, mask="random", draw=draw, heads=heads))
    return points


def _heads(indices: np.ndarray, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    layers, heads = np.unravel_index(np.sort(indices), shape)
    return tuple(zip(layers.tolist(), heads.tolist(), strict=True))


def parse_share(text: str) -> float:
    """A share from ``5%``, ``5 %`` or ``0.05``.

    Raises:
        EvalError: if it is neither.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if rest or not np.isfinite(value):
        raise EvalError(f"--mask-heads {text!a} is no share; give one like 5%")
    return value / 100 if percent else value
