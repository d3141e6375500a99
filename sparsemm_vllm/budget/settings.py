"""The settings, given to vLLM as `--additional-config '{"sparsemm": {...}}'`."""

import difflib
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from sparsemm_vllm.budget.methods import METHODS
from sparsemm_vllm.budget.profile import HeadProfile, first_error, load_profile
from sparsemm_vllm.errors import UserError
from sparsemm_vllm.names import KEY

AUTO, NO_PROFILE = "auto", "none"


class SettingsError(UserError):
    """A setting that does not exist or has a value it cannot have."""


class Settings(BaseModel):
    """How much of a prompt is kept, and by which heads.

    Attributes:
        profile: head profile: a path, a bundled name, or the profile itself; `auto` finds or makes
            the one of the model, `none` gives every head the same budget.
        budget: tokens per KV head on average, window included.
        rho: share of the budget that is spread evenly, 0 to 1.
        window: number of last prompt tokens, which every head keeps and whose attention scores the
            others.
        method: name in `METHODS` of the way in which heads share the budget.
        redistribute: whether the others get what heads cannot use of a short prompt.
        pool_kernel: width in tokens of the average pooling of the scores, odd.
        min_prompt_tokens: length of the shortest prompt that is pruned, in tokens.
        prune_when_free_below: share of the pool's blocks, 0 to 1. A prompt stays whole if at least
            this share is free with all of it in the pool. Everything is pruned if not given.
        max_request_budget: largest budget that a request may ask for, in tokens, twice the budget
            if not given; memory for it is set aside.
        allow_request_settings: whether requests may ask for another budget, or for no pruning.
        mask_heads: query heads whose output is zero, ``[layer, head]`` each: for ablations.
        record_kept: folder into which workers write which tokens each head kept; slows them down.
        record_attention: queries whose attention workers can record, for `sparsemm profile`.
        poison_freed: whether blocks are filled with NaN when requests get them, and the engine ends
            if anything is read that its reader did not write or may not see; slows it down. To
            find defects.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    profile: str | HeadProfile = AUTO
    budget: int = Field(default=256, ge=2, lt=2**31)
    rho: float = Field(default=0.1, ge=0.0, le=1.0)
    window: int = Field(default=32, ge=1, le=64)
    method: str = "sparsemm"
    redistribute: bool = False
    pool_kernel: int = Field(default=5, ge=1)
    min_prompt_tokens: int = Field(default=0, ge=0)
    prune_when_free_below: float | None = Field(default=None, gt=0.0, le=1.0)
    max_request_budget: int | None = Field(default=None, lt=2**31)
    allow_request_settings: bool = True
    mask_heads: list[list[int]] = Field(default_factory=list)
    record_kept: str | None = None
    record_attention: int = Field(default=0, ge=0)
    poison_freed: bool = False

    @field_validator("mask_heads")
    @classmethod
    def _check_masked_heads(cls, heads: list[list[int]]) -> list[list[int]]:
        for index, head in enumerate(heads):
            if len(head) != 2 or min(head) < 0:
                raise ValueError(f"{head} is no [layer, query head]")
            if head in heads[:index]:
                raise ValueError(f"{head} stands there twice")
        return heads

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str) -> str:
        if method not in METHODS:
            near = difflib.get_close_matches(method.lower(), METHODS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(METHODS)}"
            raise ValueError(f"unknown method {method!a}; {hint}")
        return method

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.budget <= self.window:
            raise ValueError(
                f"budget ({self.budget} tokens) must be larger than window ({self.window} tokens)"
            )
        if self.max_request_budget is not None and self.max_request_budget < self.budget:
            raise ValueError(
                f"max_request_budget ({self.max_request_budget} tokens) must not be smaller than "
                f"budget ({self.budget} tokens)"
            )
        if self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel ({self.pool_kernel}) must be odd")
        return self

    @property
    def largest_budget(self) -> int:
        """Most tokens per KV head on average, window included, that a request may ask for."""
        return self.max_request_budget or min(2 * self.budget, 2**31 - 1)

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> "Settings":
        """Parse vLLM's `additional_config`.

        Raises:
            SettingsError: naming the setting, what is wrong and, for an unknown one, the nearest.
        """
        if not isinstance(additional_config, dict):
            return cls()
        if KEY not in additional_config:
            keys = {key.lower(): key for key in additional_config}
            for near in difflib.get_close_matches(KEY, keys, n=1):
                key = keys[near]
                raise SettingsError(f"--additional-config has '{key}'; did you mean '{KEY}'?")
        values = additional_config.get(KEY, {})
        if not isinstance(values, dict):
            raise SettingsError(
                f"--additional-config: '{KEY}' must be an object of settings, got {values!r}"
            )
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "Settings":
        """Settings from values of JSON types, by name; the others keep their defaults.

        Raises:
            SettingsError: naming the setting, what is wrong and, for an unknown one, the nearest.
        """
        for key in values:
            if key in cls.model_fields:
                continue
            near = difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(cls.model_fields)}"
            raise SettingsError(f"unknown {KEY} setting {key!r}; {hint}")
        if isinstance(values.get("profile"), dict):
            values = values | {"profile": _parse_inline(values["profile"])}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError(f"{KEY} setting {first_error(error)}") from None

    def as_values(self) -> dict[str, Any]:
        """The values that were given, as JSON types: `from_values` makes the same settings."""
        return self.model_dump(mode="json", include=self.model_fields_set)

    def with_profile_loaded(self) -> "Settings":
        """The same settings with a profile that was named replaced by its contents.

        `auto` and `none` name no profile.

        Raises:
            ProfileError: if it cannot be read.
        """
        if not isinstance(self.profile, str) or self.profile in (AUTO, NO_PROFILE):
            return self
        return self.model_copy(update={"profile": load_profile(self.profile)})


def _parse_inline(profile: dict[str, Any]) -> HeadProfile:
    try:
        return HeadProfile.model_validate(profile)
    except ValidationError as error:
        raise SettingsError(f"{KEY} setting profile: {first_error(error)}") from None
