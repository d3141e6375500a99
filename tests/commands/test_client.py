import base64
import io

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from sparsemm_vllm.commands.client import data_url, metric, samples
from support.tiny import picture


@pytest.fixture
def page() -> str:
    registry = CollectorRegistry()
    running = Gauge("vllm:running", "Requests.", ["engine"], registry=registry)
    running.labels("0").set(3)
    running.labels("1").set(0.5)
    Gauge("vllm:running_share", "Longer name.", registry=registry).set(100)
    Counter("vllm:done", 'With " and\nlines.', ["why"], registry=registry).labels('a "b"').inc(2)
    return generate_latest(registry).decode()


def test_samples_are_summed(page):
    assert metric(page, "vllm:running") == 3.5
    assert metric(page, "vllm:running", engine="1") == 0.5
    assert metric(page, "vllm:done_total", why='a "b"') == 2
    assert [sample.labels["engine"] for sample in samples(page, "vllm:running")] == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "labels"), [("vllm:walking", {}), ("vllm:done", {}), ("vllm:running", {"engine": "2"})]
)
def test_a_metric_that_does_not_exist(page, name, labels):
    """A server whose numbers have other names must not look idle."""
    with pytest.raises(ValueError, match=f"have no {name}"):
        metric(page, name, **labels)


def test_picture_in_a_url():
    kind, _, data = data_url(picture(1)).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.tobytes() == picture(1).tobytes()
