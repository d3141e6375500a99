"""A tokenizer of any size without a vocabulary to download: most tokens spell their own number."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHARACTERS = "\t\n\r" + "".join(map(chr, range(32, 127)))
NOT_A_CHARACTER = Regex(r"[^\t\n\r -~]")


def make_tokenizer(
    size: int, special: dict[str, int], roles: dict[str, str], prepend_bos: bool
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are ``[17]`` for id 17, one for each ASCII character, and special.

    Text of any ids is made into the same ids again, whatever lies beside them: unless characters
    spell a special token or another's number. Any text is made into tokens, at most one for a
    character; those outside of ASCII become question marks.

    Args:
        size: ids; each has a token.
        special: ids by token. Characters take the lowest ids that these leave.
        roles: special tokens by what transformers calls them: ``eos_token`` and so on.
        prepend_bos: whether text that is no chat starts with the token of this role.
    """
    tokens = {token_id: token for token, token_id in special.items()}
    free = (token_id for token_id in range(size) if token_id not in tokens)
    tokens |= dict(zip(free, CHARACTERS, strict=False))
    vocab = {tokens.get(token_id, f"[{token_id}]"): token_id for token_id in range(size)}
    # Without merges: a piece is a token as it stands or is taken apart into characters.
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.Replace(NOT_A_CHARACTER, "?")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\[\d+\]|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    if prepend_bos:
        bos = roles["bos_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, special[bos])]
        )
    others = [token for token in special if token not in roles.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=others,
        clean_up_tokenization_spaces=False,
        **roles,
    )
