"""One token a character, and a few special ones."""

import string

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
CHARACTERS = string.printable[:95] + "\n"
VOCAB = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
BLANK = VOCAB[" "]


def encode(text: str) -> list[int]:
    return [VOCAB[character] for character in text]
