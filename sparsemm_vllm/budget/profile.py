"""Head profiles: visual scores of a model's query heads, with where they come from."""

import difflib
import math
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from sparsemm_vllm.errors import UserError
from sparsemm_vllm.files import write_whole


class ProfileError(UserError):
    """A profile that is missing, malformed, or made for another model."""


class HeadProfile(BaseModel):
    """Visual scores ``[L][Hq]`` of one model.

    Attributes:
        schema_version: version of this file format.
        model_id: the model that the scores were measured on.
        num_layers: layers of the model, `L`.
        num_query_heads: query heads of a layer, `Hq`.
        num_kv_heads: KV heads of a layer, `Hkv`.
        config_hash: SHA-256 of the model's configuration, hexadecimal.
        mode: name of the way of measuring: `forced` scores the true answer, `free` the answer that
            the model gives, `causal` the cost of pruning each head.
        data: name of the data set.
        data_hash: SHA-256 of the data set, hexadecimal.
        samples: number of pictures that the scores are means of.
        seed: seed that the samples were chosen with.
        split_half: Spearman rank correlation of the scores of two halves of the samples.
        tool_version: version of this package that measured.
        vllm_version: version of the vLLM that ran the model.
        created: date and time, ISO 8601.
        provenance: further facts about how the scores were measured, by name.
        scores: mean hits of each query head, ``[L][Hq]``, not negative; SparseMM (ICCV 2025),
            section 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: Literal[1] = 1
    model_id: str
    num_layers: int = Field(ge=1)
    num_query_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    config_hash: str | None = None
    mode: Literal["forced", "free", "causal"] | None = None
    data: str | None = None
    data_hash: str | None = None
    samples: int | None = Field(default=None, ge=1)
    seed: int | None = None
    split_half: float | None = Field(default=None, ge=-1, le=1, allow_inf_nan=False)
    tool_version: str | None = None
    vllm_version: str | None = None
    created: str | None = None
    provenance: dict[str, str | int | float] = Field(default_factory=dict)
    scores: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> "HeadProfile":
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_query_heads ({self.num_query_heads}) is no multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if len(self.scores) != self.num_layers:
            raise ValueError(
                f"scores has {len(self.scores)} layers, num_layers is {self.num_layers}"
            )
        for layer, row in enumerate(self.scores):
            if len(row) != self.num_query_heads:
                raise ValueError(
                    f"scores[{layer}] has {len(row)} heads, num_query_heads is "
                    f"{self.num_query_heads}"
                )
            for head, score in enumerate(row):
                if not math.isfinite(score) or score < 0:
                    raise ValueError(
                        f"scores[{layer}][{head}] is {score}; scores must be finite and not "
                        "negative"
                    )
        if not any(map(any, self.scores)):
            raise ValueError("scores are all zero: there is nothing to share the budget by")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unknown(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Optional fields that are not known are not written: older releases refuse the names."""
        return {name: value for name, value in serialize(self).items() if value is not None}

    @classmethod
    def uniform(
        cls, model_id: str, num_layers: int, num_query_heads: int, num_kv_heads: int
    ) -> "HeadProfile":
        """The profile that gives every head the same budget."""
        return cls(
            model_id=model_id,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            provenance={"method": "uniform: no scores were measured"},
            scores=((1.0,) * num_query_heads,) * num_layers,
        )

    def check_model(self, num_layers: int, num_query_heads: int, num_kv_heads: int) -> None:
        """Refuse a model of another architecture.

        Raises:
            ProfileError: naming both sides.
        """
        mine = (self.num_layers, self.num_query_heads, self.num_kv_heads)
        model = (num_layers, num_query_heads, num_kv_heads)
        if mine != model:
            raise ProfileError(
                f"head profile of {self.model_id} has {mine[0]} layers, {mine[1]} query heads and "
                f"{mine[2]} KV heads; the model has {model[0]}, {model[1]} and {model[2]}. Use a "
                "profile made for this model"
            )

    def check_config(self, config_hash: str) -> None:
        """Refuse a model of another configuration; profiles that do not know theirs go with any.

        Args:
            config_hash: hash of the model's configuration; see `config_hash.config_hash`.

        Raises:
            ProfileError: naming both.
        """
        if self.config_hash not in (None, config_hash):
            raise ProfileError(
                f"head profile of {self.model_id} was made for a model with the configuration hash "
                f"{self.config_hash}; this model's is {config_hash}. Use a profile made for this "
                "model: `sparsemm profile` makes one"
            )

    def tensor(self) -> torch.Tensor:
        """The scores, float64 ``[L, Hq]``."""
        return torch.tensor(self.scores, dtype=torch.float64)


def first_error(error: ValidationError) -> str:
    """The first of pydantic's findings as one line: where, and what is wrong."""
    finding: Any = error.errors()[0]
    where = ".".join(str(part).encode("unicode_escape").decode() for part in finding["loc"])
    message = finding["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def bundled_profiles() -> list[str]:
    """Names of the profiles that come with this package."""
    folder = resources.files("sparsemm_vllm.head_profiles")
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith("json"))


def _file(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # too long for a name; the home of an unknown user
        return None


def load_profile(name: str) -> HeadProfile:
    """Read a profile by path, or by the name of a bundled one.

    Raises:
        ProfileError: naming the file and what is wrong with it.
    """
    names = bundled_profiles()
    if path := _file(name):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ProfileError(f"head profile {name!r}: {error.strerror}") from None
    elif name in names:
        return load_bundled_profile(name)
    else:
        near = difflib.get_close_matches(name, [*names, "auto", "none"], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ProfileError(
            f"head profile {name!r} is neither a file nor a bundled profile "
            f"({', '.join(names) or 'none are bundled'}){hint}"
        )
    return _parse(name, text)


def load_bundled_profile(name: str) -> HeadProfile:
    """Read one of `bundled_profiles`."""
    folder = resources.files("sparsemm_vllm.head_profiles")
    return _parse(name, folder.joinpath(f"{name}.json").read_bytes())


def _parse(name: str, text: bytes) -> HeadProfile:
    try:
        return HeadProfile.model_validate_json(text)
    except ValidationError as error:
        raise ProfileError(f"head profile {name!r}: {first_error(error)}") from None


def save_profile(profile: HeadProfile, path: Path | str) -> None:
    """Write a profile so that there is never half of one: see `write_whole`.

    Raises:
        OSError: naming `path`, if its folder does not exist or cannot be written.
    """
    write_whole(path, profile.model_dump_json(indent=1) + "\n")
