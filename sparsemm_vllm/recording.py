"""Writes down which tokens each head kept, for people and tests that want to look.

Copies positions to the host while the engine runs, so it is off unless a folder is set.
"""

import glob
import os
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch


class KeptRecorder:
    """One file per request and rank, written when the last layer has been pruned."""

    def __init__(self, folder: Path, own: tuple[slice, slice]) -> None:
        self._folder = folder
        self._own = own
        self._rank = f"layers{own[0].start}-{own[0].stop}.heads{own[1].start}-{own[1].stop}"
        self._layers: dict[str, list[list[np.ndarray]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self, request_id: str, positions: torch.Tensor, lengths: torch.Tensor, prompt_tokens: int
    ) -> None:
        """Record the next layer of a request.

        Args:
            request_id: vLLM's.
            positions: kept positions per head, ascending, ``[Hkv, width]``.
            lengths: how many of them count, ``[Hkv]``.
            prompt_tokens: `n`.
        """
        kept = positions.cpu().numpy()
        heads = [kept[h, :k].copy() for h, k in enumerate(lengths.tolist())]
        layers = self._layers.setdefault(request_id, [])
        layers.append(heads)
        if len(layers) == self._own[0].stop - self._own[0].start:
            self._write(request_id, self._layers.pop(request_id), prompt_tokens)

    def _write(self, request_id: str, layers: list[list[np.ndarray]], prompt_tokens: int) -> None:
        path = self._folder / f"{quote(request_id, safe='')}.{self._rank}.npz"
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        with partial.open("wb") as file:
            np.savez(
                file,
                prompt_tokens=prompt_tokens,
                first_layer=self._own[0].start,
                first_head=self._own[1].start,
                lengths=np.array([[len(head) for head in heads] for heads in layers]),
                positions=np.concatenate([head for heads in layers for head in heads]),
            )
        partial.replace(path)


def load_kept(folder: Path, request_id: str) -> dict[tuple[int, int], np.ndarray]:
    """Kept positions, the window not among them, by (pruned layer, KV head) of the whole model.

    Args:
        folder: as given to the engine.
        request_id: vLLM's, with or without the eight digits that it appends to the client's.

    Raises:
        FileNotFoundError: if nothing was recorded for it.
    """
    name = glob.escape(quote(request_id, safe=""))
    files = [f for end in ("", "-????????") for f in folder.glob(f"{name}{end}.layers*.npz")]
    if not files:
        raise FileNotFoundError(f"no kept tokens of request {request_id} in {folder}")
    kept: dict[tuple[int, int], np.ndarray] = {}
    for file in files:
        with np.load(file) as data:
            lengths, positions = data["lengths"], data["positions"]
            layer, head = int(data["first_layer"]), int(data["first_head"])
        parts = np.split(positions, lengths.cumsum()[:-1])
        for (i, j), part in zip(np.ndindex(*lengths.shape), parts, strict=True):
            kept[layer + i, head + j] = part
    return kept
