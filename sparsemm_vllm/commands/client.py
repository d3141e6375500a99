"""What clients of a server need: pictures as URLs, and numbers out of its metrics."""

import base64
import io

from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """The picture as a URL that holds it, for ``image_url`` in a message."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def samples(page: str, name: str, **labels: str) -> list[Sample]:
    """The samples of a metric in Prometheus' text format, those with these labels.

    Args:
        page: text that `/metrics` answered.
        name: name of the samples, ``_total`` included.
        labels: labels that they must have, and their values.

    Raises:
        ValueError: if there is none.
    """
    lines = "\n".join(line for line in page.splitlines() if line.startswith(name))
    found = [
        sample
        for family in text_string_to_metric_families(lines)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    if not found:
        raise ValueError(f"the server's metrics have no {name} {labels or ''}".rstrip())
    return found


def pool_blocks(page: str) -> int:
    """KV blocks of a server with one engine, the one that holds nothing included."""
    (config,) = samples(page, "vllm:cache_config_info")
    return int(config.labels["num_gpu_blocks"])


def metric(page: str, name: str, **labels: str) -> float:
    """Sum of a metric's `samples`: over engines and over the labels that are not given."""
    return sum(sample.value for sample in samples(page, name, **labels))
