"""What a checkpoint answers in stock transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sparsemm_vllm.data.pictures import Sample

MAX_ANSWER = 72  # tokens


class Reader:
    """A checkpoint in stock transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: Any = "sdpa") -> None:
        self.processor = LlavaProcessor.from_pretrained(folder)
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        ).eval()

    def inputs(
        self,
        samples: list[Sample],
        answers: bool = False,
        contexts: list[str] | None = None,
        filler: str = "",
    ) -> Any:
        """Model inputs for the samples' chats, padded on the left, with or without answers.

        ``contexts`` are system messages, one a sample; ``filler`` goes before every question.
        """
        before = contexts or [""] * len(samples)
        texts = [
            self.prompt(f"{filler}{sample.question}", context)
            for sample, context in zip(samples, before, strict=True)
        ]
        if answers:
            texts = [f"{t}{s.answer}</s>" for t, s in zip(texts, samples, strict=True)]
        images = [sample.image for sample in samples]
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        return inputs.to(self.model.dtype)

    def prompt(self, text: str, context: str = "") -> str:
        """The chat of one picture and one question, after a system message if there is any."""
        content: list[Any] = [{"type": "image"}, {"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        if context:
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": context}]})
        return self.processor.apply_chat_template(chat, add_generation_prompt=True)

    @torch.no_grad()
    def answer(
        self,
        samples: list[Sample],
        contexts: list[str] | None = None,
        filler: str = "",
        rows: int = 50,
    ) -> list[str]:
        """Greedy answers, generated ``rows`` samples at a time."""
        texts: list[str] = []
        for start in range(0, len(samples), rows):
            part = slice(start, start + rows)
            inputs = self.inputs(
                samples[part], contexts=contexts[part] if contexts else None, filler=filler
            )
            ids = self.model.generate(**inputs, max_new_tokens=MAX_ANSWER, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            texts += self.processor.batch_decode(new, skip_special_tokens=True)
        return texts
