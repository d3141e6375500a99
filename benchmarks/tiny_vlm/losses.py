"""What training minimises: answers, the glyph in every patch, the text before the picture."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from .rows import IGNORE, Batch
from .vocabulary import BLANK

FIGURES = ("loss", "text_loss", "glyph_loss", "accuracy", "glyphs")  # of a training step


@dataclass(frozen=True)
class Weights:
    """What the parts of the loss weigh."""

    blank: float = 0.1  # a patch without a glyph, of the glyph loss
    glyph: float = 1.0
    query: float = 3.0  # the answers about single lines, which are short
    text: float = 0.3


def row_logits(model: LlavaForConditionalGeneration, batch: Batch, mask: Tensor) -> Tensor:
    """What the stock forward computes, ``[B, T, vocabulary]``, for rows of the training layout."""
    inner = model.model
    features = inner.vision_tower(batch.pixels.to(model.dtype)).last_hidden_state[:, 1:]
    embeddings = inner.language_model.embed_tokens(batch.ids)
    embeddings = embeddings.scatter(
        1, image_columns(batch, embeddings), inner.multi_modal_projector(features)
    )
    hidden = inner.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)


def image_columns(batch: Batch, rows: Tensor) -> Tensor:
    """Columns of the image tokens, as an index into ``rows [B, T, width]``: ``[B, P, width]``."""
    columns = batch.image[:, None] + torch.arange(batch.glyphs.shape[1], device=rows.device)
    return columns[..., None].expand(-1, -1, rows.shape[-1])


def picture_loss(
    model: LlavaForConditionalGeneration, batch: Batch, mask: Tensor, weights: Weights
) -> tuple[Tensor, Tensor]:
    """The loss of rows with pictures, and `FIGURES` for the log."""
    logits = row_logits(model, batch, mask).float()
    labelled = batch.labels != IGNORE
    answer, prose = labelled & (batch.segments > 0), labelled & (batch.segments == 0)
    emphasis = answer * torch.where(batch.segments > 1, weights.query, 1.0)
    each = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    each = each.view(answer.shape)
    loss = (each * emphasis).sum() / emphasis.sum()
    text_loss = (each * prose).sum() / prose.sum().clamp(min=1)
    right = ((logits.argmax(-1) == batch.labels) & answer).sum() / answer.sum()
    seen = logits.gather(1, image_columns(batch, logits))
    ink = batch.glyphs != BLANK
    weight = torch.where(ink, 1.0, weights.blank)
    each = F.cross_entropy(seen.flatten(0, 1), batch.glyphs.flatten(), reduction="none")
    glyph_loss = (each * weight.flatten()).sum() / weight.sum()
    glyphs = ((seen.argmax(-1) == batch.glyphs) & ink).sum() / ink.sum()
    figures = torch.stack([loss, text_loss, glyph_loss, right, glyphs]).detach()
    return loss + weights.glyph * glyph_loss + weights.text * text_loss, figures


def text_loss(
    model: LlavaForConditionalGeneration, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of rows of text only, ``ids [B, T + 1]``, and `FIGURES` for the log."""
    hidden = model.model.language_model(
        input_ids=ids[:, :-1], attention_mask=mask, use_cache=False
    ).last_hidden_state
    logits, labels = model.lm_head(hidden), ids[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    right = (logits.argmax(-1) == labels).float().mean()
    none = torch.zeros(())
    return loss, torch.stack([none, loss, none, right, none]).detach()
