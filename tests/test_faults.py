"""A server to which something happens: it goes on, or ends and says why, as vLLM does."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from engines import serve_options, settings
from tiny import make_llama, skewed_profile

from sparsemm_vllm.server import Server, ServerError

pytestmark = pytest.mark.engine

TEXT = "a prompt without a picture that is much longer than what is kept of it"


@dataclass(frozen=True)
class Served:
    """A running server and the head profile that it was given by name."""

    server: Server
    profile: Path
    model: Path
    options: list[str]

    def ask(self, text: str = TEXT) -> str:
        client = openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="tiny", prompt=text, temperature=0, max_tokens=12)
        return answer.choices[0].text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    profile = folder / "profile.json"
    profile.write_text(json.dumps(skewed_profile().model_dump(mode="json")))
    options = serve_options(settings(40, profile=str(profile)))
    model = make_llama(folder / "model")
    with Server(str(model), options, folder / "log") as server:
        server.wait_until_ready()
        yield Served(server, profile, model, options)


def test_the_profile_file_may_change_while_it_is_served(served: Served) -> None:
    before = served.ask()
    contents = served.profile.read_text()
    even = skewed_profile().model_copy(update={"scores": ((1.0,) * 8,) * 4})
    for changed in (json.dumps(even.model_dump(mode="json")), contents[:50], "", None):
        if changed is None:
            served.profile.unlink()
        else:
            served.profile.write_text(changed)
        httpx.post(f"{served.server.url}/reset_prefix_cache")
        assert served.ask() == before


def test_a_taken_port_is_vllms_own_error(served: Served, tmp_path: Path) -> None:
    again = [*served.options, "--port", str(served.server.port)]
    before = served.ask()
    with Server(str(served.model), again, tmp_path / "log") as second:
        with pytest.raises(ServerError, match="ended with code 1"):
            second.wait_until_ready(timeout=120)
        assert "Address already in use" in second.log.read_text()
    assert served.ask() == before


def kill_while_it_decodes(server: Server, name: str, count: int = 1) -> None:
    """End the first of so many processes whose command line has the name; the server must end."""
    assert server._process is not None
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model="tiny",
        prompt=TEXT,
        temperature=0,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    children = psutil.Process(server._process.pid).children(recursive=True)
    named = [child for child in children if name in " ".join(child.cmdline())]
    assert len(named) == count
    named[0].kill()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        for _ in stream:
            pass
    with pytest.raises(ServerError, match=r"ended with code"):
        server.check_alive(patience=60)
    log = server.log.read_text()
    assert re.search(r"Engine core .*died|EngineDeadError", log), log[-2000:]


def test_an_engine_killed_while_it_decodes_ends_the_server(served: Served) -> None:
    """The client is told, /health says so, and the server ends, as it does with dense attention."""
    kill_while_it_decodes(served.server, "EngineCore")


@pytest.mark.slow
def test_one_of_two_workers_killed_while_it_decodes_ends_the_server(
    served: Served, tmp_path: Path
) -> None:
    words = serve_options(settings(40), tensor_parallel_size="2")
    with Server(str(served.model), words, tmp_path / "log") as server:
        server.wait_until_ready()
        kill_while_it_decodes(server, "Worker", count=2)
