"""Tokens of answers and words of pictures, with tokenizers of three kinds."""

import json

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsemm_vllm.data.pictures import Sample, Word
from sparsemm_vllm.profiler.words import (
    places_anywhere,
    places_in_answer,
    token_spans,
    words_of_tokens,
)
from support.tiny import make_tokenizer

TEXT = [
    "CODE QJZW ROOM QZ35 the harbor window the garden",
    "naïve café 42, müßig; 東京 駅前 ☕ the end",
] * 3


def sample(answer: str, *words: str, answer_words: tuple[int, ...] | None = None) -> Sample:
    """Words in the order of the answer, if nothing else is said."""
    chosen = tuple(range(len(words))) if answer_words is None else answer_words
    boxes = tuple(Word(text, (i, 0, i + 1, 1)) for i, text in enumerate(words))
    return Sample(Image.new("RGB", (64, 64)), boxes, "Read.", answer, chosen)


def byte_level() -> PreTrainedTokenizerFast:
    """As of Qwen and Llama 3: merges of bytes, spaces before words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """As of Llama 2 and Vicuna: a mark in place of spaces, dropped before the first word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = sorted(set("".join(TEXT).replace("東", "").replace(" ", "")))
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<unk>", "</s>", *bytes_],
        initial_alphabet=letters,
        limit_alphabet=len(letters) + 1,
    )
    tokenizer.train_from_iterator([t.replace("東", "") for t in TEXT], trainer)
    plain = json.loads(tokenizer.to_str()) | {"added_tokens": []}  # bytes are no special tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {"characters": make_tokenizer, "bytes": byte_level, "sentence pieces": sentence_piece}


def owners(tokenizer, asked: Sample, places) -> list[tuple[str, int | None]]:
    """What each token of the true answer adds, and its word."""
    ids = tokenizer.encode(asked.answer, add_special_tokens=False)
    text, spans = token_spans(tokenizer, ids)
    assert text == asked.answer
    words = words_of_tokens(text, spans, places(text, asked))
    return [(text[a:b], word) for (a, b), word in zip(spans, words, strict=True)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("places", [places_in_answer, places_anywhere])
def test_every_word_is_found_whatever_its_tokens(kind: str, places) -> None:
    asked = sample("CODE QJZW, ROOM QZ35", "CODE", "QJZW", "ROOM", "QZ35")
    found = owners(TOKENIZERS[kind](), asked, places)
    for index, word in enumerate(asked.words):
        pieces = [piece for piece, owner in found if owner == index]
        assert "".join(pieces).strip() == word.text
    others = [piece for piece, owner in found if owner is None]
    assert set("".join(others)) <= {",", " "}


@pytest.mark.parametrize("kind", ["bytes", "sentence pieces"])
def test_characters_that_several_tokens_share(kind: str) -> None:
    """Only the token that completes the character adds it."""
    asked = sample("東京 ☕ café", "東京", "☕", "café")
    tokenizer = TOKENIZERS[kind]()
    found = owners(tokenizer, asked, places_in_answer)
    assert any(piece == "" for piece, _ in found), "some characters have more than one token"
    for index, word in enumerate(asked.words):
        assert "".join(p for p, owner in found if owner == index).strip() == word.text
    assert all(owner is None for piece, owner in found if not piece.strip())


def test_tokens_that_span_words_are_not_counted() -> None:
    text, spans = "AB CD", [(0, 1), (1, 4), (4, 5)]
    asked = sample("AB CD", "AB", "CD")
    assert words_of_tokens(text, spans, places_in_answer(text, asked)) == [0, None, 1]


def test_special_tokens_add_nothing() -> None:
    tokenizer = make_tokenizer()
    ids = [*tokenizer.encode("AB", add_special_tokens=False), tokenizer.eos_token_id]
    assert token_spans(tokenizer, ids) == ("AB", [(0, 1), (1, 2), (2, 2)])
    assert words_of_tokens("AB", [(2, 2)], places_anywhere("AB", sample("AB", "AB"))) == [None]


def test_the_true_answer_tells_words_of_the_same_text_apart() -> None:
    asked = sample("the end the", "the", "end", "the")
    text = "ASSISTANT: the end the \n"
    places = places_in_answer(text, asked)
    assert [(p.word, text[slice(*p.span)]) for p in places] == [(0, "the"), (1, "end"), (2, "the")]
    assert [p.span[0] for p in places] == [11, 15, 19]


def test_an_answer_that_the_tokenizer_changed_has_no_places() -> None:
    assert places_in_answer("ASSISTANT: CAFE", sample("CAFÉ", "CAFÉ")) == []


def test_an_answer_of_some_of_the_words() -> None:
    asked = sample("B2", "KEY", "B2", "X", answer_words=(1,))
    assert [p.word for p in places_in_answer("KEY? B2", asked)] == [1]


def test_free_answers_say_words_anywhere() -> None:
    asked = sample("", "AB", "CD", "CD")
    text = "It says CD, then AB. ABC, xAB and AB2 are others; AB-CD both."
    places = places_anywhere(text, asked)
    first = [(p.word, p.span) for p in places if p.word == 0]
    assert [span for _, span in first] == [(17, 19), (50, 52)]
    spans = [(8, 10), (17, 19), (50, 55)]
    assert words_of_tokens(text, spans, places) == [None, 0, None], "CD stands there twice"


def test_scripts_without_spaces() -> None:
    text = "駅前の東京です"
    asked = sample("", "東京", "駅前")
    spans = [(i, i + 1) for i in range(len(text))]
    owners = words_of_tokens(text, spans, places_anywhere(text, asked))
    assert owners == [1, 1, None, 0, 0, None, None]
