"""What is compared: methods with budgets, and models with some of their heads silenced."""

from collections.abc import Iterable
from dataclasses import dataclass, field
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
        method: way to divide the budget among heads, one of `METHODS`.
        budget: tokens per KV head on average, window included; none for the dense cache.
        redistribute: whether the other heads get what a head cannot use of a short prompt.
        mask: kind of the query heads that are silenced, of `MASKS`; none if there are none.
        draw: number of the draw, from 0; for random heads only.
        heads: query heads that are silenced, (layer, query head).
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

    def settings(self, shared: Settings) -> Settings:
        """Settings of this point's engine.

        Args:
            shared: settings of all points.

        Raises:
            SettingsError: for a method or a budget that a server would refuse.
        """
        own: dict[str, Any] = {"method": self.method, "redistribute": self.redistribute}
        if self.budget is not None:
            own["budget"] = self.budget
        else:
            own["budget"] = max(2, shared.window + 1)  # allowed, and of no consequence
        if self.heads:
            own["mask_heads"] = [list(head) for head in self.heads]
        return Settings.from_values(shared.as_values() | own)


@dataclass(frozen=True)
class Comparison:
    """What is compared with the dense cache.

    Attributes:
        methods: methods to measure, of `METHODS`.
        budgets: budgets to measure each method with, in tokens per KV head on average.
        redistribute: whether redistributed budgets are measured too.
        mask_share: share of the query heads to silence, as text; none for no such points.
        masks: kinds of heads to silence, of `MASKS`.
        draws: number of draws of random heads.
    """

    methods: list[str]
    budgets: list[int]
    redistribute: bool = False
    mask_share: str | None = None
    masks: list[str] = field(default_factory=lambda: list(MASKS))
    draws: int = 3

    def points(self, model: str, profile: HeadProfile | None) -> list[Point]:
        """All points, the dense cache first.

        Args:
            model: name of the model.
            profile: head profile of the model, if there is one.

        Raises:
            EvalError: if there is nothing to compare, or a profile is wanting.
        """
        points = [Point(DENSE)]
        points += method_points(self.methods, self.budgets, self.redistribute)
        if profile is None and any(point.method == "sparsemm" for point in points):
            raise EvalError(
                f"sparsemm needs a head profile of {model}: give --profile (`sparsemm profile` "
                "makes one)"
            )
        if self.mask_share is not None:
            if profile is None:
                raise EvalError(f"--mask-heads needs a head profile of {model}: give --profile")
            points += mask_points(profile, parse_share(self.mask_share), self.masks, self.draws)
        if len(points) == 1:
            raise EvalError("nothing to compare with the dense cache: give --methods and --budgets")
        return points


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
        profile: head profile of the model: its scores say which heads are visual.
        share: share of all query heads to silence, 0 to 1; at least one head is silenced.
        masks: kinds of heads to silence, of `MASKS`.
        draws: number of draws of random heads.

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
