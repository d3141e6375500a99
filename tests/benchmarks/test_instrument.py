"""The instrument's checkpoint: what it claims to be, and that it reads."""

import pytest
import torch
from offline.subjects import SUBJECTS, TASKS
from safetensors.torch import load_file
from tiny_vlm.answers import Reader
from transformers import LlavaForConditionalGeneration

from sparsemm_vllm.budget.profile import load_profile
from sparsemm_vllm.commands.evaluate.metrics import Marks
from sparsemm_vllm.data.pictures import CLUTTERED_SIZE

INSTRUMENT = SUBJECTS["instrument"]
MAX_BYTES = 4_500_000
PICTURES = 12
LEAST = {"read": 0.75, "query": 0.3}  # of the words; 0.93 and 0.60 of 300 pictures


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(INSTRUMENT.folder, torch.float32)


def test_weights_are_small_and_float16_under_the_names_that_vllm_expects():
    weights = INSTRUMENT.folder / "model.safetensors"
    assert weights.stat().st_size <= MAX_BYTES
    tensors = load_file(weights)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    tower = [name for name in tensors if "vision_tower" in name]
    assert tower
    assert all("vision_tower.vision_model." in name for name in tower)


def test_stock_transformers_finds_every_weight():
    _, info = LlavaForConditionalGeneration.from_pretrained(
        INSTRUMENT.folder, output_loading_info=True
    )
    assert not any(info.values()), info


def test_it_has_64_kv_heads_and_256_image_tokens(reader):
    text = reader.model.config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (8, 8, 8)
    inputs = reader.inputs(INSTRUMENT.held_out(0, 1, "read").samples)
    assert int((inputs["input_ids"] == reader.model.config.image_token_id).sum()) == 256
    assert inputs["pixel_values"].shape == (1, 3, CLUTTERED_SIZE, CLUTTERED_SIZE)


def test_a_system_message_comes_before_the_picture(reader):
    assert reader.prompt("Why?", "Be brief.") == "<s>Be brief.<user><image>\nWhy?<assistant>"
    assert reader.prompt("Why?") == "<s><user><image>\nWhy?<assistant>"


def test_its_profile_is_its_own():
    profile = load_profile(str(INSTRUMENT.profile))
    profile.check_model(8, 8, 8)
    assert (profile.model_id, profile.mode) == ("sparsemm-instrument", "forced")


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_a_pure_function_of_the_seed(task):
    first, again = (INSTRUMENT.held_out(3, 2, task) for _ in range(2))
    assert (first.answers, first.contexts) == (again.answers, again.contexts)
    assert first.contexts != INSTRUMENT.for_scores(3, 2, task).contexts


@pytest.mark.parametrize("task", TASKS)
def test_it_reads_held_out_pictures(reader, task):
    asked = INSTRUMENT.held_out(0, PICTURES, task)
    marks = Marks.of(asked.answers, reader.answer(asked.samples, asked.contexts))
    assert marks.statistics()["exact_words"] >= LEAST[task]
