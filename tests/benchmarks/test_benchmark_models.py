"""The 7B models of the benchmarks, without weights: benchmarks/models."""

import json

import models
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from models.head_scores import CONCENTRATION, concentrated_scores, top_mass
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import load_profile

LLAVA = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
QWEN = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
VOCABULARIES = {32064: LLAVA, 152064: QWEN}
# L, Hq, Hkv, hidden size, of the MLP, vocabulary, positions, base of RoPE, KiB of KV a token.
SHAPES = {
    "llava-1.5-7b": (32, 32, 32, 4096, 11008, 32064, 4096, 1e4, 512),
    "llava-next-vicuna-7b": (32, 32, 32, 4096, 11008, 32064, 4096, 1e4, 512),
    "llava-next-mistral-7b": (32, 32, 8, 4096, 14336, 32064, 32768, 1e6, 128),
    "qwen2-vl-7b": (28, 28, 4, 3584, 18944, 152064, 32768, 1e6, 56),
}
# Of square pictures of 336 and 672 pixels, and of one that is wide.
IMAGE_TOKENS = {
    "llava-1.5-7b": (576, 576, 576),
    "llava-next-vicuna-7b": (1176, 2928, 2182),
    "llava-next-mistral-7b": (1176, 2928, 2182),
    "qwen2-vl-7b": (144, 576, 396),
}
FORMATS = {
    "llava-1.5-7b": "USER: <image>\nWhat? ASSISTANT: this</s>USER: And? ASSISTANT:",
    "llava-next-vicuna-7b": "USER: <image>\nWhat? ASSISTANT: this</s>USER: And? ASSISTANT:",
    "llava-next-mistral-7b": "[INST] <image>\nWhat? [/INST] this</s>[INST] And? [/INST]",
    "qwen2-vl-7b": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
    "<|im_start|>assistant\nthis<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
    "<|im_start|>assistant\n",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """All of them."""
    folder = tmp_path_factory.mktemp("models")
    return {name: models.prepare(name, folder) for name in models.NAMES}


@pytest.fixture(scope="module", params=models.NAMES)
def model(request, folders):
    """Name and folder."""
    return request.param, folders[request.param]


@pytest.fixture(scope="module", params=["llava-1.5-7b", "qwen2-vl-7b"])
def tokenizer(request, folders):
    """Of each vocabulary."""
    return AutoTokenizer.from_pretrained(folders[request.param])


def test_the_configuration_is_the_published_one(model):
    name, folder = model
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    head_size = text.hidden_size // text.num_attention_heads
    assert getattr(text, "head_dim", head_size) == head_size == 128
    shape = (
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.hidden_size,
        text.intermediate_size,
        text.vocab_size,
        text.max_position_embeddings,
        text.rope_parameters["rope_theta"],
        2 * text.num_hidden_layers * text.num_key_value_heads * head_size * 2 / 1024,
    )
    assert shape == SHAPES[name]
    special = VOCABULARIES[text.vocab_size]
    assert config.image_token_id == special.get("<image>", special.get("<|image_pad|>"))
    assert getattr(text, "sliding_window", None) is None
    assert not text.tie_word_embeddings
    assert str(config.dtype) in ("bfloat16", "torch.bfloat16")


def test_the_towers_are_the_published_ones(model):
    name, folder = model
    config = AutoConfig.from_pretrained(folder)
    vision = config.vision_config
    if name == "qwen2-vl-7b":
        assert (vision.depth, vision.embed_dim, vision.hidden_size) == (32, 1280, 3584)
        assert (vision.num_heads, vision.mlp_ratio) == (16, 4)
        assert (vision.patch_size, vision.spatial_merge_size) == (14, 2)
        assert config.get_text_config().rope_parameters["mrope_section"] == [16, 24, 24]
        return
    assert (vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size) == (
        24,
        1024,
        4096,
    )
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 336, 14)
    assert vision.hidden_act == "quick_gelu"
    assert config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == "default"
    if "next" in name:
        assert [list(map(int, p)) for p in config.image_grid_pinpoints] == [
            [336, 672],
            [672, 336],
            [672, 672],
            [1008, 336],
            [336, 1008],
        ]


def test_every_id_has_a_text_of_its_own(tokenizer):
    size = len(tokenizer)
    assert tokenizer.vocab_size == size
    special = VOCABULARIES[size]
    assert tokenizer.convert_tokens_to_ids(list(special)) == list(special.values())
    assert set(special.values()) <= set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[token_id] for token_id in range(size)])
    assert all(texts)
    assert len(set(texts)) == size
    assert tokenizer.decode(list(special.values()), skip_special_tokens=True) == ""


@given(data=st.data())
def test_ids_come_back_from_their_text(tokenizer, data):
    """Characters between them as well, unless they spell a special token or a number."""
    ids = st.integers(0, len(tokenizer) - 1)
    tokens = data.draw(st.lists(ids, max_size=50))
    assume(not set(tokens) & set(tokenizer.convert_tokens_to_ids(["<", "["])))
    text = tokenizer.decode(tokens)
    assert tokenizer.encode(text, add_special_tokens=False) == tokens


def test_long_random_prompts_come_back(tokenizer):
    tokens = np.random.default_rng(0).integers(0, len(tokenizer), 32_000).tolist()
    text = tokenizer.decode(tokens)
    assert tokenizer.encode(text, add_special_tokens=False) == tokens
    assert len(text) < 8 * len(tokens)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_has_tokens(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) <= len(text)
    assert bool(tokens) == bool(text)
    plain = "".join(c if c in "\t\n\r" or " " <= c <= "~" else "?" for c in text)
    assert tokenizer.decode(tokens) == plain


def test_json_survives(tokenizer):
    text = json.dumps({"box": [17], "rest": [[1, 2], "~`\\", [999999]]}, indent=1)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_text_that_is_no_chat_starts_as_the_models_do(tokenizer):
    tokens = tokenizer("a").input_ids
    assert tokens[:-1] == ([1] if len(tokenizer) == 32064 else [])
    assert tokenizer.num_special_tokens_to_add() == len(tokens) - 1


def test_pictures_have_the_right_number_of_tokens(model):
    name, folder = model
    processor = AutoProcessor.from_pretrained(folder)
    image_token = AutoConfig.from_pretrained(folder).image_token_id
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    counts = []
    for size in ((336, 336), (672, 672), (1000, 300)):
        inputs = processor(images=Image.new("RGB", size), text=prompt)
        counts.append(list(inputs["input_ids"][0]).count(image_token))
    assert tuple(counts) == IMAGE_TOKENS[name]


def test_chats_have_the_models_format(model):
    name, folder = model
    processor = AutoProcessor.from_pretrained(folder)
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "content": "this"},
        {"role": "user", "content": "And?"},
    ]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == FORMATS[name]
    chat.insert(0, {"role": "system", "content": "Be brief."})
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert "Be brief." in prompt
    assert "helpful" not in prompt


def test_the_profile_fits_and_says_that_it_is_synthetic(model):
    name, folder = model
    profile = load_profile(str(folder / "profile.json"))
    profile.check_model(*SHAPES[name][:3])
    profile.check_config(config_hash(AutoConfig.from_pretrained(folder)))
    assert profile.config_hash is not None
    assert profile.model_id == f"synthetic, for {name}"
    assert "synthetic" in str(profile.provenance["method"])
    for share, mass in CONCENTRATION:
        assert top_mass(profile.tensor().numpy(), share) == pytest.approx(mass, abs=1e-6)


def test_seeds_differ_in_their_order_only():
    one, other = (concentrated_scores(8, 16, seed).flatten().numpy() for seed in (0, 1))
    assert (one != other).any()
    np.testing.assert_array_equal(np.sort(one), np.sort(other))


def test_the_published_scores_are_that_concentrated(published):
    """And beyond the two conditions the synthetic ones stay near them."""
    scores, own = published[0].numpy(), concentrated_scores(32, 32, 0).numpy()
    for share, mass in CONCENTRATION:
        assert top_mass(scores, share) == pytest.approx(mass, abs=0.01)
    for share in (0.01, 0.02, 0.2, 0.3, 0.5):
        assert top_mass(own, share) == pytest.approx(top_mass(scores, share), abs=0.02)


def test_a_folder_is_made_once(folders):
    folder = folders["llava-1.5-7b"]
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert models.prepare("llava-1.5-7b", folder.parent) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert sorted(f.name for f in folder.parent.iterdir()) == sorted(models.NAMES), "scratch left"


def test_a_folder_that_is_not_finished_is_made_again(folders, tmp_path):
    folder = models.prepare("llava-1.5-7b", tmp_path)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / models.MADE_BY).write_text("older code")
    (folder / "tokenizer.json").write_text("{")
    models.prepare("llava-1.5-7b", tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    same = {file.name: file.read_bytes() for file in folders["llava-1.5-7b"].iterdir()}
    assert whole == same, "it depends on nothing but the name"


def test_unknown_models_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'llava-2'.*llava-1\.5-7b"):
        models.prepare("llava-2", tmp_path)
