"""The served reader under many clients that do everything clients do; see benchmarks/soak.py."""

import asyncio
from collections.abc import Iterator

import pytest
from soak import Soak

from sparsemm_vllm.commands.server import Server
from sparsemm_vllm.reader import READER, reader_folder
from support.engines import serve_options

pytestmark = pytest.mark.engine

# Python and the allocators keep some of what a burst needed; a leak of pictures would be more.
SPARE_MIB = 64
KINDS = {
    "answered: answered",
    "about_text: answered",
    "disconnected: hung up",
    "unreadable_picture: refused",
    "too_long: refused",
    "unknown_setting: refused",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = serve_options(
        {"budget": 96, "window": 16, "poison_freed": True},
        served_model_name=READER,
        max_model_len="1024",
        max_num_seqs="16",
        kv_cache_memory_bytes=str(32 << 20),
        mm_processor_cache_gb="0",  # it would go on growing to its 4 GB
    )
    with Server(str(reader_folder()), options, tmp_path_factory.mktemp("soak") / "log") as running:
        running.wait_until_ready()
        yield running


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("requests", "minutes"),
    [
        pytest.param(500, 3, id="CI"),
        pytest.param(20_000, 30, id="long", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_behind(server: Server, requests: int, minutes: float) -> None:
    soak = Soak(server.url, READER, server.pid)
    report = asyncio.run(soak.run(requests, 16, 60 * minutes))
    print(report)
    assert report.failures == []
    assert report.outcomes.keys() == KINDS
    assert report.probes >= 2
    assert report.blocks_in_use == 0
    warm, final = report.rss_mib
    assert final < warm + SPARE_MIB
