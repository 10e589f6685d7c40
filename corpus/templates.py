"""Prompts and responses as tokens: the tokenizer's chat template, and special tokens exactly once.

The chat template is the authority on special tokens, as it is in transformers and in vLLM's chat endpoint: what it
writes is tokenised with nothing added, so training sees what a served model sees. A tokenizer without a template gets
the dialogue template (see `choose_template`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from corpus.dialogues import check_messages, messages_of
from corpus.problems import UsageProblem
from corpus.special_text import SpecialText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["auto", "dialogue", "plain"]

DIALOGUE_TEMPLATE = (
    "{%- set names = {'system': 'System', 'user': 'Human', 'assistant': 'Assistant'} -%}"
    "{%- for message in messages -%}"
    "{{- '\\n\\n' + names[message['role']] + ': ' + message['content'] -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n\\nAssistant:' -}}{%- endif -%}"
)
"""The stated default, "\\n\\nHuman: …\\n\\nAssistant:", from the HH data (github.com/anthropics/hh-rlhf). It needs no
token that a base model's vocabulary lacks, base models know its like from the web, HH dialogues stay as they are."""

PLAIN_TEMPLATE = "{%- for message in messages -%}{{- message['content'] + ('' if loop.last else ' ') -}}{%- endfor -%}"
"""The prompt's own text and nothing else, for corpora whose prompts already say where the answer goes ("TL;DR:")."""

_SENTINEL = "sentinel"


def choose_template(tokenizer: "PreTrainedTokenizerBase", template: TemplateName = "auto") -> str:
    """Sets the tokenizer's chat template and returns which one it is: "own", "dialogue" or "plain".

    "auto" keeps the tokenizer's own and falls back on "dialogue". Ours begin with BOS where the tokenizer adds BOS to
    plain text. The template is saved with the tokenizer, so exports and served models render prompts the same way.
    """
    if template == "auto" and tokenizer.chat_template is not None:
        return "own"
    name = "dialogue" if template == "auto" else template
    tokenizer.chat_template = _our_template(tokenizer, name)
    return name


def _our_template(tokenizer: "PreTrainedTokenizerBase", name: Literal["dialogue", "plain"]) -> str:
    text = DIALOGUE_TEMPLATE if name == "dialogue" else PLAIN_TEMPLATE
    return "{{- bos_token -}}" + text if adds_bos(tokenizer) else text


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True where the tokenizer puts BOS before plain text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def check_special_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises UsageProblem unless the tokenizer has an EOS and a PAD token that differ.

    With PAD = EOS the EOS at the end of a response is masked as padding, and the model never learns to stop.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    if tokenizer.eos_token_id is None:
        raise UsageProblem(f"{name}: this tokenizer has no EOS token, so a response could not end.", "model/tokenizer")
    if tokenizer.pad_token_id is None:
        raise UsageProblem(
            f"{name}: this tokenizer has no PAD token; give it one that differs from EOS.", "model/tokenizer"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UsageProblem(
            f"{name}: PAD and EOS are the same token ({tokenizer.eos_token}); the model would never learn to stop. "
            "Give the tokenizer a PAD token of its own.",
            "model/tokenizer",
        )


def render_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[Mapping[str, str]]) -> str:
    """The text that the model is given for a prompt (a plain text, a dialogue, or chat messages), special tokens in.

    Rendered by the tokenizer's chat template, else by DIALOGUE_TEMPLATE. Raises UsageProblem where the template
    refuses the conversation (some take no system message, or want users and assistants to alternate).
    """
    messages = messages_of(prompt) if isinstance(prompt, str) else check_messages(prompt)
    return _render(tokenizer, messages, reply_next=True)


def _render(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], *, reply_next: bool) -> str:
    import jinja2

    template = None if tokenizer.chat_template else _our_template(tokenizer, "dialogue")
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=reply_next
        )
    except jinja2.TemplateError as error:
        start = messages[0]["content"][:60]
        raise UsageProblem(
            f"the chat template refuses the prompt that begins {start!r} ({error}).", "model/chat-template"
        ) from error
    assert isinstance(text, str)
    return text


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str | Sequence[Mapping[str, str]]]
) -> list[list[int]]:
    """Token ids of each prompt as the model is given it; BOS at most once, no EOS added.

    Special tokens are those that the template writes. One written out inside a prompt's own text is text.
    """
    rendered = [render_prompt(tokenizer, prompt) for prompt in prompts]
    encoded = _encode(tokenizer, rendered, special=True)
    special = SpecialText(tokenizer)
    for row, prompt in enumerate(prompts):
        messages = messages_of(prompt) if isinstance(prompt, str) else check_messages(prompt)
        if special.is_in(messages):
            encoded[row] = special.encode(messages, lambda hidden: _render(tokenizer, hidden, reply_next=True))
    bos = tokenizer.bos_token_id
    for tokens in encoded:
        while bos is not None and tokens[:2] == [bos, bos]:  # some templates write a second one
            tokens.pop(0)
    return encoded


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of one prompt (text, dialogue or chat messages) as the model is given it; BOS at most once."""
    return encode_prompts(tokenizer, [prompt])[0]


def response_lead(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The white space that the chat template writes between the prompt and a reply ("" or " ", mostly).

    A response is tokenised behind it, so that its first word is the token that it is in the model's own text.
    """
    user = {"role": "user", "content": "a"}
    prompt = _render(tokenizer, [user], reply_next=True)
    whole = _render(tokenizer, [user, {"role": "assistant", "content": _SENTINEL}], reply_next=False)
    if not whole.startswith(prompt) or _SENTINEL not in whole[len(prompt) :]:
        return ""
    lead = whole[len(prompt) : whole.index(_SENTINEL, len(prompt))]
    return lead if not lead.strip() else ""


def encode_responses(
    tokenizer: "PreTrainedTokenizerBase", responses: Sequence[str], *, end: bool = True
) -> list[list[int]]:
    """Token ids of each response, EOS last exactly once (none with `end=False`), no BOS.

    Special tokens written out inside a response are text, except one EOS at its end, which is not doubled.
    """
    eos_id, eos = tokenizer.eos_token_id, tokenizer.eos_token
    if not isinstance(eos_id, int) or not isinstance(eos, str):
        raise UsageProblem(
            f"{tokenizer.name_or_path}: this tokenizer has no EOS token, so a response could not end.",
            "model/tokenizer",
        )
    lead = response_lead(tokenizer)
    texts = []
    for response in responses:
        text = response.removesuffix(eos)
        texts.append(text if not text or text.startswith(lead) else lead + text)
    encoded = encode_text(tokenizer, texts)
    return [[*tokens, eos_id] for tokens in encoded] if end else encoded


def encode_response(tokenizer: "PreTrainedTokenizerBase", response: str, *, end: bool = True) -> list[int]:
    """Token ids of one response, EOS last exactly once (none with `end=False`), no BOS."""
    return encode_responses(tokenizer, [response], end=end)[0]


def encode_text(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts: nothing added, and special tokens written out in them stay text."""
    return _encode(tokenizer, texts, special=False)


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:  # tokenizers fail on an empty batch
        return []
    encoded: Any = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=not special, return_attention_mask=False
    )
    return [list(tokens) for tokens in encoded["input_ids"]]


def decode_responses(tokenizer: "PreTrainedTokenizerBase", responses: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row of response tokens, without special tokens and without the template's lead."""
    lead = response_lead(tokenizer)
    texts = [str(tokenizer.decode(list(tokens), skip_special_tokens=True)) for tokens in responses]
    return [text.removeprefix(lead) for text in texts]
