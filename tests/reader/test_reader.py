"""The shipped checkpoint: small, loads in stock transformers, and reads."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sparsemm_vllm.data.pictures import EVAL_SEEDS, PICTURE_SIZE, Sample, Task, make_sample

READER = Path(str(files("sparsemm_vllm"))) / "reader"
SAMPLES = 24
MAX_BYTES = 10_000_000


@pytest.fixture(scope="module")
def loaded():
    return LlavaForConditionalGeneration.from_pretrained(
        READER, dtype=torch.float32, output_loading_info=True
    )


@pytest.fixture(scope="module")
def processor():
    return LlavaProcessor.from_pretrained(READER)


def generate(model, processor, samples: list[Sample]) -> list[str]:
    prompts = [chat_prompt(processor, sample.question) for sample in samples]
    images = [sample.image for sample in samples]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=72, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat_prompt(processor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True)


def exact_words(samples: list[Sample], answers: list[str]) -> float:
    right = words = 0
    for sample, answer in zip(samples, answers, strict=True):
        truth = sample.answer.split(" ")
        words += len(truth)
        right += sum(a == b for a, b in zip(truth, answer.split(" "), strict=False))
    return right / words


def test_weights_are_float16_and_within_the_size_limit():
    weights = READER / "model.safetensors"
    assert weights.stat().st_size <= MAX_BYTES
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}


def test_weight_names_are_those_vllm_expects():
    tower = [name for name in load_file(READER / "model.safetensors") if "vision_tower" in name]
    assert tower
    assert all("vision_tower.vision_model." in name for name in tower)


def test_stock_transformers_finds_every_weight(loaded):
    assert not any(keys for keys in loaded[1].values()), loaded[1]


def test_one_image_token_per_patch(loaded, processor):
    config = loaded[0].config
    inputs = processor(
        images=[make_sample(0).image], text=[chat_prompt(processor, "?")], return_tensors="pt"
    )
    patches = (PICTURE_SIZE // config.vision_config.patch_size) ** 2
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == patches >= 144
    assert inputs["pixel_values"].shape == (1, 3, PICTURE_SIZE, PICTURE_SIZE)


def test_pictures_are_not_resampled(processor):
    image = make_sample(0).image
    values = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    levels = ((values + 1) * 127.5).permute(1, 2, 0)
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(levels.shape)
    torch.testing.assert_close(levels, raw.float(), atol=1e-3, rtol=0)


def test_chat_template_puts_the_picture_first_and_closes_answers(processor):
    chat = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Read the text."}, {"type": "image"}],
        },
        {"role": "assistant", "content": "AB 2C"},
        {"role": "user", "content": "What follows AB?"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == (
        "<s><user><image>\nRead the text.<assistant>AB 2C</s><user>What follows AB?<assistant>"
    )


@pytest.mark.parametrize("task", ["read", "query"])
def test_it_reads_held_out_pictures(loaded, processor, task: Task):
    samples = [make_sample(EVAL_SEEDS[i], task) for i in range(SAMPLES)]
    answers = generate(loaded[0], processor, samples)
    assert exact_words(samples, answers) >= 0.9
