"""Special tokens written out in a prompt's own text: they stay text, those of the chat template stay special."""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from corpus.dialogues import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_INS = range(0xE000, 0xF900)  # the private use area: characters that mean nothing by themselves


class SpecialText:
    """Tells a template's special tokens from the same characters in a message."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._tokenizer = tokenizer
        self._special = {token.content: (id, token) for id, token in added.items() if token.special}
        longest_first = sorted(self._special, key=len, reverse=True)  # tokenizers take the longest at each place
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def is_in(self, messages: Iterable[Message]) -> bool:
        """Whether a message holds what the tokenizer would read as a special token."""
        return any(self._pattern.search(message["content"]) for message in messages)

    def encode(self, messages: list[Message], render: Callable[[list[Message]], str]) -> list[int]:
        """Token ids of the messages as `render` writes them, where special tokens inside the messages are text.

        The messages are rendered with stand-ins for such texts, so that what is still found are the template's own
        special tokens; the text between these is tokenised with special tokens off. Tokenizers treat the text between
        special tokens apart too, so all other text has the ids that it always has. Limits: a template that looks for
        special tokens inside a message does not find them; a tokenizer that begins each text with a space begins the
        pieces so; one with a word of its vocabulary that equals a special token (word-level) still gives that id.
        """
        contents = "".join(message["content"] for message in messages)
        unused = (chr(code) for code in _STAND_INS if chr(code) not in contents)
        found = {text for message in messages for text in self._pattern.findall(message["content"])}
        stand_ins = dict(zip(sorted(found), unused, strict=False))
        hidden = [
            {**message, "content": self._pattern.sub(lambda match: stand_ins[match[0]], message["content"])}
            for message in messages
        ]
        originals = {ord(stand_in): text for text, stand_in in stand_ins.items()}
        tokens: list[int] = []
        pieces = re.split(f"({self._pattern.pattern})", render(hidden))  # text, special token, text, …
        for place, piece in enumerate(pieces):
            if place % 2:
                tokens.append(self._special[piece][0])
                continue
            if place and self._special[pieces[place - 1]][1].rstrip:  # this token swallows the white space after it
                piece = piece.lstrip()
            if place + 1 < len(pieces) and self._special[pieces[place + 1]][1].lstrip:
                piece = piece.rstrip()
            if piece:
                tokens += self._plain(piece.translate(originals))
        return tokens

    def _plain(self, text: str) -> list[int]:
        encoded: Any = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        return list(encoded["input_ids"])
