"""What one request may ask for: ``vllm_xargs`` of the OpenAI API, ``SamplingParams.extra_args``.

vLLM's Python front end refuses what cannot be, with an error that names the key. Others do not ask
us. So the scheduler and the workers look again, with the same function: a request that asks for
what cannot be is served as if it had asked for nothing. There it never fails.
"""

import difflib
from copy import copy
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.methods import METHODS
from sparsemm_vllm.budget.profile import first_error
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.errors import UserError
from sparsemm_vllm.names import BUDGET, KNOCKOUT, LEFT_DENSE, PRUNE, RECORD

PREFIX = "sparsemm"
SHOWN = 100  # characters of a client's key or id that we repeat

_Count = Annotated[int, Field(ge=0, lt=2**31)]


class RequestError(UserError):
    """A request asks for something that does not exist, or that it cannot have."""


class RequestSettings(BaseModel):
    """The keys that begin with `sparsemm`.

    Attributes:
        sparsemm: switch, 1 or 0; with 0 the prompt stays whole.
        sparsemm_budget: tokens per KV head on average, window included, in place of the server's.
        sparsemm_record: first row and number of queries for `AttentionRecorder`, in engines that
            record attention.
        sparsemm_knockout: pruned layer, KV head and first position of the answer for `Knockouts`,
            in engines that record attention.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sparsemm: int = Field(default=1, ge=0, le=1)
    sparsemm_budget: int | None = None
    sparsemm_record: list[_Count] | None = Field(default=None, min_length=2, max_length=2)
    sparsemm_knockout: list[_Count] | None = Field(default=None, min_length=3, max_length=3)

    @field_validator("sparsemm", mode="before")
    @classmethod
    def _bool_is_int(cls, value: Any) -> Any:
        return int(value) if isinstance(value, bool) else value


NOTHING_ASKED = RequestSettings()


@dataclass(frozen=True)
class RequestLimits:
    """What a server lets requests ask for.

    Attributes:
        window: observation window of the server, in tokens.
        largest_budget: tokens per KV head on average, window included.
        prunes: whether the server's method prunes anything.
        recorded: queries whose attention its workers can record; 0 if they record none.
        allowed: whether requests may ask for anything at all.
    """

    window: int
    largest_budget: int
    prunes: bool = True
    recorded: int = 0
    allowed: bool = True

    @classmethod
    def of(cls, settings: Settings) -> "RequestLimits":
        """The limits of a server with these settings."""
        return cls(
            settings.window,
            settings.largest_budget,
            METHODS[settings.method].prunes,
            settings.record_attention,
            settings.allow_request_settings,
        )


def asks_for_us(extra_args: dict[str, Any] | None) -> bool:
    """Whether a request has keys that only SPARSEMM could mean."""
    return any(map(_is_ours, extra_args or ()))


def _is_ours(key: Any) -> bool:
    return str(key)[: len(PREFIX)].lower() == PREFIX


def check_request(extra_args: dict[str, Any], limits: RequestLimits) -> RequestSettings:
    """What a request asks for; other plugins' keys are left alone.

    Args:
        extra_args: extra arguments in a request's sampling parameters.
        limits: limits of the server.

    Raises:
        RequestError: one line that names the key and says what it may be.
    """
    asked = {key: value for key, value in extra_args.items() if _is_ours(key)}
    for key in asked:
        if key not in RequestSettings.model_fields:
            shown = str(key)[:SHOWN]
            near = difflib.get_close_matches(shown.lower(), (PRUNE, BUDGET), n=1, cutoff=0.0)
            raise RequestError(f"unknown request setting {shown!a}; did you mean '{near[0]}'?")
        if not limits.allowed:
            raise RequestError(
                f"request setting {key}: this server lets no request have its own "
                "(allow_request_settings)"
            )
    try:
        request = RequestSettings.model_validate(asked)
    except ValidationError as error:
        raise RequestError(f"request setting {first_error(error)}") from None
    for key in (RECORD, KNOCKOUT):
        if key in asked and not limits.recorded:
            raise RequestError(f"request setting {key}: this server records no attention")
    if request.sparsemm_budget is not None:
        _check_budget(request, limits)
    return request


def _check_budget(request: RequestSettings, limits: RequestLimits) -> None:
    budget = request.sparsemm_budget
    assert budget is not None
    if not limits.window < budget <= limits.largest_budget:
        shown = f"{budget} tokens" if abs(budget) < 2**64 else "a number of more than 64 bits"
        raise RequestError(
            f"request setting {BUDGET}: {shown}; this server takes {limits.window + 1} "
            f"to {limits.largest_budget} (its window and max_request_budget)"
        )
    if not request.sparsemm:
        raise RequestError(f"request setting {BUDGET}: '{PRUNE}' is 0, so nothing is pruned")
    if not limits.prunes:
        raise RequestError(f"request setting {BUDGET}: this server prunes nothing (method full)")


@dataclass(frozen=True)
class Accepted:
    """What a request gets, on scheduler and workers alike.

    Attributes:
        settings: settings that the request asked for; `NOTHING_ASKED` if it cannot have them.
        problem: sentence that says what was wrong, if anything.
        left_dense: whether the scheduler leaves the prompt whole.
    """

    settings: RequestSettings = NOTHING_ASKED
    problem: str | None = None
    left_dense: bool = False

    def layout(self, server: CacheLayout) -> CacheLayout:
        """The cache layout of the request, by that of the server."""
        if self.left_dense or not self.settings.sparsemm:
            return server.dense
        budget = self.settings.sparsemm_budget
        return server if budget is None else server.of_budget(budget)

    def send(self, params: Any) -> Any:
        """Sampling parameters from which a worker reads this, and nothing else of ours.

        A copy if they change: the samples of one prompt may share theirs.
        """
        before = params.extra_args or {}
        ours = self.settings.model_dump(exclude_defaults=True)
        if self.left_dense:
            ours[LEFT_DENSE] = True
        after = {key: value for key, value in before.items() if not _is_ours(key)} | ours
        if after != before:
            params = copy(params)
            params.extra_args = after
        return params


def accept(extra_args: dict[str, Any] | None, limits: RequestLimits) -> Accepted:
    """What a request gets that maybe no front end has checked. Never fails.

    Args:
        extra_args: extra arguments in the request's sampling parameters, as the client sent them.
        limits: limits of the server.
    """
    if not asks_for_us(extra_args):
        return Accepted()
    assert extra_args is not None
    try:
        return Accepted(check_request(extra_args, limits))
    except RequestError as error:
        return Accepted(problem=str(error))


def received(extra_args: dict[str, Any] | None, limits: RequestLimits) -> Accepted:
    """What a request gets, on a worker: as the scheduler sent it.

    Args:
        extra_args: extra arguments in the request's sampling parameters, from `Accepted.send`.
        limits: limits of the server.
    """
    if extra_args and LEFT_DENSE in extra_args:
        rest = {key: value for key, value in extra_args.items() if key != LEFT_DENSE}
        return replace(accept(rest, limits), left_dense=bool(extra_args[LEFT_DENSE]))
    return accept(extra_args, limits)
