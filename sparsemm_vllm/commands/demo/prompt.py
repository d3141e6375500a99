"""Where the demo's picture stands in its prompt."""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from sparsemm_vllm.geometry import Geometry, image_tokens


def picture_in_prompt(
    model: Path, image: Image.Image, question: str, prompt_tokens: int
) -> tuple[Geometry, np.ndarray]:
    """The image tokens of a chat message with one picture and a question.

    Args:
        model: folder of the model.
        image: picture, as it was sent.
        question: text beside it.
        prompt_tokens: length of the prompt in tokens, as the server counted it.

    Returns:
        What each image token shows, and the positions of these tokens, int64 ``[image tokens]``.

    Raises:
        ValueError: if the server counted another number of tokens.
    """
    processor = AutoProcessor.from_pretrained(model)
    config = AutoConfig.from_pretrained(model)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    ids = processor(text=text, images=image, add_special_tokens=False)["input_ids"][0]
    if len(ids) != prompt_tokens:
        raise ValueError(
            f"the prompt has {len(ids)} tokens by the model's processor, and {prompt_tokens} by "
            "the server"
        )
    positions = np.flatnonzero(np.array(ids) == config.image_token_index)
    return image_tokens(config, processor, image.size), positions
