"""The benchmarks' models in vLLM's engine, shrunk and with dummy weights."""

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from models.head_scores import synthetic_profile
from PIL import Image
from transformers import AutoProcessor
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from sparsemm_vllm.engine.config import Serving
from sparsemm_vllm.engine.worker.probes.kept import load_kept
from support.engines import WINDOW, Engine

pytestmark = pytest.mark.engine

# Overrides: the folders are those that benchmarks use.
LLAVA = {
    "text_config": {
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 32,
        "hidden_size": 256,
        "intermediate_size": 256,
    },
    "vision_config": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
    },
}
QWEN = {
    "text_config": {
        "num_hidden_layers": 2,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "hidden_size": 224,
        "intermediate_size": 256,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [4, 6, 6],
        },
    },
    "vision_config": {"depth": 2, "num_heads": 2, "embed_dim": 64, "hidden_size": 224},
}
BUDGET = 64
LONGEST = 40_000
QUESTION = "What is this, \u00e9?"


@pytest.mark.parametrize("name", models.NAMES)
def test_vllm_takes_the_full_size_and_its_profile(name: str, tmp_path: Path) -> None:
    """And prompts beyond the published positions, if these are overridden."""
    folder = models.prepare(name, tmp_path)
    profile = str(folder / "profile.json")
    load_general_plugins()
    config = EngineArgs(
        model=str(folder),
        load_format="dummy",
        attention_backend="SPARSEMM",
        additional_config={"sparsemm": {"budget": BUDGET, "profile": profile}},
        max_model_len=LONGEST,
        hf_overrides={"text_config": {"max_position_embeddings": LONGEST}},
    ).create_engine_config()
    layout = Serving.of(config).layout
    text = config.model_config.hf_text_config
    assert text.max_position_embeddings == LONGEST
    capacities = np.array(layout.capacities)
    assert capacities.shape == (text.num_hidden_layers, text.num_key_value_heads)
    assert capacities.max() > 5 * np.median(capacities)


@pytest.mark.parametrize(
    ("name", "overrides", "image_tokens"),
    [("llava-1.5-7b", LLAVA, 576), ("qwen2-vl-7b", QWEN, 144)],
)
def test_a_chat_is_answered(
    name: str, overrides: dict[str, Any], image_tokens: int, tmp_path: Path
) -> None:
    """With text in every token, and pruned."""
    folder, text = models.prepare(name, tmp_path), overrides["text_config"]
    L, Hq, Hkv = (
        text[f"num_{of}"] for of in ("hidden_layers", "attention_heads", "key_value_heads")
    )
    profile = synthetic_profile("a shrunk model", L, Hq, Hkv).model_dump(mode="json")
    engine = Engine(
        folder,
        {"budget": BUDGET, "window": WINDOW, "profile": profile, "record_kept": str(tmp_path)},
        load_format="dummy",
        hf_overrides=overrides,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    picture = Image.new("RGB", (336, 336), "red")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    rendered = AutoProcessor.from_pretrained(folder).apply_chat_template(
        chat, add_generation_prompt=True
    )
    chat[0]["content"][0] = {"type": "image_pil", "image_pil": picture}
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    (output,) = engine.llm.chat(chat, params, use_tqdm=False)

    tokenizer = engine.llm.get_tokenizer()
    image_token = engine.llm.model_config.hf_config.image_token_id
    prompt = output.prompt_token_ids
    assert prompt.count(image_token) == image_tokens
    last = len(prompt) - 1 - prompt[::-1].index(image_token)
    once = [t for i, t in enumerate(prompt) if t != image_token or i == last]
    assert tokenizer.decode(once) == rendered.replace("\u00e9", "?")

    (answer,) = output.outputs
    texts = [tokenizer.decode([token]) for token in answer.token_ids]
    assert len(texts) == 8
    assert all(texts)
    assert answer.text == "".join(texts)

    kept = load_kept(tmp_path, output.request_id)
    held = sum(map(len, kept.values()))
    assert len(kept) == L * Hkv
    assert 0 < held <= L * Hkv * (BUDGET + 1), "one for rounding"
    assert engine.all_free()
