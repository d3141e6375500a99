"""The way from a name or a path to samples."""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from sparsemm_vllm.data.bundled import bundled_samples
from sparsemm_vllm.data.coco import CocoFormat
from sparsemm_vllm.data.pictures import PICTURE_SIZE, Sample
from sparsemm_vllm.data.rows import SkippedError, Table
from sparsemm_vllm.data.samples import DataError, SampleSet, hash_samples
from sparsemm_vllm.data.synthdog import SynthdogFormat
from sparsemm_vllm.data.tables import open_table

FORMATS = SynthdogFormat, CocoFormat


def load_samples(source: str, count: int, seed: int) -> SampleSet:
    """Choose samples: the same arguments and files give the same ones.

    Args:
        source: name or path. ``ocr`` means drawn pictures, as the bundled reader knows them;
            ``ocr-SIDE`` means drawn pages of English words, with that many pixels a side (448 to
            672 suit larger models). A path names a folder or file of the synthdog-en-detection
            data set, or of one in the format of COCO detection: Parquet, a folder that `datasets`'
            ``save_to_disk`` wrote, JSON or JSON Lines with pictures beside.
        count: number of samples, from 1; fewer are chosen if the data set has fewer usable ones.
        seed: number from 0. It decides the order in which the rows of a data set are tried; for
            drawn pictures, it is the number of the first one.

    Raises:
        DataError: if the source cannot be read, is in neither format, or has no usable sample.
    """
    if count < 1:
        raise DataError(f"the number of samples must be at least 1, got {count}")
    if drawn := re.fullmatch(r"ocr(-\d+)?", source):
        side = int(drawn[1][1:]) if drawn[1] else PICTURE_SIZE
        samples = bundled_samples(count, seed, side)
        return SampleSet(samples, source, hash_samples(samples))
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}")
    return _choose(open_table(Path(source)), count, seed)


def _choose(table: Table, count: int, seed: int) -> SampleSet:
    data = _format_of(table)
    skipped: Counter[str] = Counter()
    samples: list[Sample] = []
    for index in np.random.default_rng(seed).permutation(table.count):
        if len(samples) == count:
            break
        try:
            samples.append(data.sample(table.read(int(index)), skipped))
        except SkippedError as error:
            skipped[f"samples: {error}"] += 1
    if not samples:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in skipped.most_common())
        raise DataError(
            f"{table.path}: no usable sample among {table.count}: {reasons or 'it is empty'}; "
            "repair the files or use another data set"
        )
    return SampleSet(samples, data.name, hash_samples(samples), dict(skipped))


def _format_of(table: Table) -> SynthdogFormat | CocoFormat:
    for data in FORMATS:
        if table.columns & set(data.columns):
            return data(table)
    expected = " nor ".join(f"{data.name} ({' or '.join(data.columns)})" for data in FORMATS)
    found = ", ".join(sorted(table.columns)) or "none"
    raise DataError(f"{table.path}: neither {expected}; its columns: {found}")
