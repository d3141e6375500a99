"""Writes down which tokens each head kept, for people and tests that want to look.

Copies positions to the host while the engine runs, so it is off unless a folder is set.
"""

import hashlib
import io
import logging
import re
from pathlib import Path

import numpy as np
import torch

from sparsemm_vllm.files import write_whole

logger = logging.getLogger("vllm.sparsemm.recording")

RANDOM_END = re.compile(r"(.*)-([0-9a-f]{8})", re.DOTALL)  # vLLM appends it to the client's id


class KeptRecorder:
    """One file per request and rank, written when the last layer has been pruned.

    A file's name is a hash, since clients choose ids; its `request_id` holds the id's UTF-8 bytes.
    What cannot be written is lost, and the engine goes on.

    Attributes:
        lost: requests that could not be written.
    """

    def __init__(self, folder: Path, own: tuple[slice, slice]) -> None:
        self.lost = 0
        self._folder = folder
        self._own = own
        self._rank = f"layers{own[0].start}-{own[0].stop}.heads{own[1].start}-{own[1].stop}"
        self._layers: dict[str, list[list[np.ndarray]]] = {}
        self._said: set[str | None] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self, request_id: str, positions: torch.Tensor, lengths: torch.Tensor, prompt_tokens: int
    ) -> None:
        """Record the next layer of a request.

        A step prunes all layers, so that no request ends between two of them.

        Args:
            request_id: name that vLLM gave the request.
            positions: kept positions of each head, ascending, ``[Hkv, width]``.
            lengths: number of them that count, ``[Hkv]``.
            prompt_tokens: length of the prompt, `n`, in tokens.
        """
        kept = positions.cpu().numpy()
        heads = [kept[h, :k].copy() for h, k in enumerate(lengths.tolist())]
        layers = self._layers.setdefault(request_id, [])
        layers.append(heads)
        if len(layers) == self._own[0].stop - self._own[0].start:
            self._write(request_id, self._layers.pop(request_id), prompt_tokens)

    def _write(self, request_id: str, layers: list[list[np.ndarray]], prompt_tokens: int) -> None:
        content = io.BytesIO()
        np.savez(
            content,
            request_id=np.frombuffer(_bytes(request_id), dtype=np.uint8),
            prompt_tokens=prompt_tokens,
            first_layer=self._own[0].start,
            first_head=self._own[1].start,
            lengths=np.array([[len(head) for head in heads] for heads in layers]),
            positions=np.concatenate([head for heads in layers for head in heads]),
        )
        file = self._folder / f"{_name(request_id)}.{self._rank}.npz"
        try:
            write_whole(file, content.getvalue())
        except OSError as error:
            self._lose(request_id, error)

    def _lose(self, request_id: str, error: OSError) -> None:
        """Count, and warn of each reason once, and of the 10th, the 100th and so on."""
        self.lost += 1
        if error.strerror not in self._said or str(self.lost).strip("0") == "1":
            self._said.add(error.strerror)
            logger.warning(
                "SPARSEMM: record_kept could not write request %r, %d so far are lost: %s",
                request_id, self.lost, error,
            )  # fmt: skip


def load_kept(folder: Path, request_id: str) -> dict[tuple[int, int], np.ndarray]:
    """Kept positions, the window not among them, by (pruned layer, KV head) of the whole model.

    Args:
        folder: folder that the engine was given.
        request_id: name that vLLM gave the request, or the client's, to which vLLM appends ``-``
            and eight random digits. Of requests that a client gave the same id, the last counts.

    Raises:
        FileNotFoundError: if nothing was recorded for it.
    """
    files = list(folder.glob(f"{_name(request_id)}.layers*.npz"))
    if not files:
        found = list(folder.glob(f"{_hash(request_id)}-????????.layers*.npz"))
        last = max(found, key=lambda file: file.stat().st_mtime_ns, default=None)
        files = [f for f in found if last and f.name.split(".")[0] == last.name.split(".")[0]]
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


def _name(request_id: str) -> str:
    """The name of a request's files, whatever its client called it.

    The hash is that of the client's id, so that both ids lead to the files.
    """
    if parts := RANDOM_END.fullmatch(request_id):
        return f"{_hash(parts[1])}-{parts[2]}"
    return _hash(request_id)


def _hash(text: str) -> str:
    return hashlib.blake2b(_bytes(text), digest_size=16).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
