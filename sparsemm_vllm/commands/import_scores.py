"""Published head scores, ``{"layer-head": [score, ...]}``, as a head profile."""

import hashlib
import json
import math
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsemm_vllm import __version__
from sparsemm_vllm.budget.profile import HeadProfile, ProfileError, first_error

HEAD = re.compile(r"(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})")
FORMAT = 'expected {"layer-head": [score, ...], ...}'


def import_scores(path: Path, model_id: str, num_kv_heads: int | None = None) -> HeadProfile:
    """Read the format of the SparseMM authors' files.

    A head's score is the mean of its list. Layers and query heads are those named in the file.

    Args:
        path: JSON file.
        model_id: name of the model that the scores were measured on.
        num_kv_heads: KV heads of a layer; as many as query heads if not given.

    Raises:
        ProfileError: naming the file and what is wrong with it.
    """
    if not model_id.strip():
        raise ProfileError("the model id is empty; give the name that people serve the model by")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ProfileError(f"scores file {str(path)!r}: {error.strerror}") from None
    try:
        scores = _scores(_parse(raw))
        return HeadProfile(
            model_id=model_id,
            num_layers=len(scores),
            num_query_heads=len(scores[0]),
            num_kv_heads=len(scores[0]) if num_kv_heads is None else num_kv_heads,
            tool_version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            provenance={
                "method": "sparsemm import-scores: means of published scores",
                "source": path.name,
                "source_sha256": hashlib.sha256(raw).hexdigest(),
            },
            scores=scores,
        )
    except ValidationError as error:
        raise ProfileError(f"scores file {str(path)!r}: {first_error(error)}") from None
    except ProfileError as error:
        raise ProfileError(f"scores file {str(path)!r}: {error}") from None


def _parse(raw: bytes) -> list[tuple[str, Any]]:
    """The file's keys and values in order, keys that occur twice among them."""
    try:
        parsed = json.loads(raw, object_pairs_hook=tuple, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"this is no JSON ({error}); {FORMAT}") from None
    if not isinstance(parsed, tuple) or not parsed:
        raise ProfileError(f"this is no object of scores; {FORMAT}")
    return list(parsed)


def _scores(by_name: list[tuple[str, Any]]) -> tuple[tuple[float, ...], ...]:
    """Mean scores ``[L][Hq]``."""
    by_head: dict[tuple[int, int], float] = {}
    for name, values in by_name:
        match = HEAD.fullmatch(name)
        if match is None:
            raise ProfileError(f"key {name[:40]!a} is no layer and head; {FORMAT}")
        head = (int(match[1]), int(match[2]))
        if head in by_head:
            raise ProfileError(f"head {name} occurs twice")
        by_head[head] = _mean(name, values)

    L, Hq = (1 + max(numbers) for numbers in zip(*by_head, strict=True))
    if len(by_head) < L * Hq:
        per_layer = Counter(layer for layer, _ in by_head)
        layer = next(i for i in range(L) if per_layer[i] < Hq)
        missing = next(i for i in range(Hq) if (layer, i) not in by_head)
        raise ProfileError(
            f"head {layer}-{missing} is missing: {len(by_head)} scores for {L} layers of {Hq} heads"
        )
    return tuple(tuple(by_head[layer, head] for head in range(Hq)) for layer in range(L))


def _mean(name: str, values: Any) -> float:
    if not isinstance(values, list) or not values:
        raise ProfileError(f"head {name} has no list of scores; {FORMAT}")
    for value in values:
        if not isinstance(value, float):
            raise ProfileError(f"head {name} has a score that is no number; {FORMAT}")
        if not math.isfinite(value) or value < 0:
            raise ProfileError(
                f"head {name} has the score {value}; scores must be finite and not negative"
            )
    return sum(values) / len(values)
