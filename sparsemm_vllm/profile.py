"""Head profiles: visual scores of a model's query heads, with where they come from."""

import difflib
import math
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ProfileError(ValueError):
    """A profile that is missing, malformed, or made for another model."""


class HeadProfile(BaseModel):
    """Visual scores ``[L][Hq]`` of one model.

    Attributes:
        schema_version: of this file format.
        model_id: the model the scores were measured on.
        num_layers: `L`.
        num_query_heads: `Hq`.
        num_kv_heads: `Hkv`.
        provenance: how, on what data and when the scores were measured.
        scores: hits per sample and head, not negative; SparseMM (ICCV 2025), section 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: Literal[1] = 1
    model_id: str
    num_layers: int = Field(ge=1)
    num_query_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
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
        text = resources.files("sparsemm_vllm.head_profiles").joinpath(f"{name}.json").read_bytes()
    else:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ProfileError(
            f"head profile {name!r} is neither a file nor a bundled profile "
            f"({', '.join(names) or 'none are bundled'}){hint}"
        )
    try:
        return HeadProfile.model_validate_json(text)
    except ValidationError as error:
        raise ProfileError(f"head profile {name!r}: {first_error(error)}") from None
