"""Conversations as text: the dialogue format of the HH data, and its chat messages.

A prompt is one string everywhere in the corpus. A plain prompt is a request; a conversation is a dialogue,
"\\n\\nHuman: …\\n\\nAssistant: …\\n\\nHuman: …\\n\\nAssistant:", the format of github.com/anthropics/hh-rlhf with a
"System" speaker added. Tokenizers render it through their own chat template (corpus/templates.py).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from corpus.problems import UsageProblem

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
_ROLES = {speaker: role for role, speaker in SPEAKERS.items()}
_MARKER = re.compile(r"\n\n(System|Human|Assistant):(?=\s|\Z)")
_LAST_WORD = "\n\nAssistant:"

Message = dict[str, str]


def is_dialogue(text: str) -> bool:
    """True where the text begins with a turn marker, so that it is a conversation and not one plain request."""
    return _MARKER.match(text) is not None


def messages_of(prompt: str) -> list[Message]:
    """The chat messages of a prompt or of a whole dialogue: `[{"role": …, "content": …}, …]`.

    A plain prompt is one user message. An "Assistant:" that is empty at the end (where the reply will go) is left out.
    """
    if not is_dialogue(prompt):
        return [{"role": "user", "content": prompt}]
    pieces = _MARKER.split(prompt)[1:]  # speaker, content, speaker, content, …
    messages = [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return messages


def dialogue(messages: Sequence[Mapping[str, str]], *, reply_next: bool) -> str:
    """The messages as a dialogue; with `reply_next` it ends in "\\n\\nAssistant:".

    A turn marker inside a message would be read as a turn: its empty line is closed up ("\\n\\nHuman:" → "\\nHuman:").
    """
    turns = [f"\n\n{SPEAKERS[message['role']]}: {_close_up(message['content'].strip())}" for message in messages]
    return "".join(turns) + (_LAST_WORD if reply_next else "")


def prompt_of(messages: Sequence[Mapping[str, str]]) -> str:
    """The messages before a reply as one prompt: a single user message is a plain prompt, all else a dialogue."""
    if len(messages) == 1 and messages[0]["role"] == "user" and not is_dialogue(messages[0]["content"]):
        return messages[0]["content"]
    return dialogue(messages, reply_next=True)


def settled(prompt: str) -> str:
    """The prompt as it comes out of a dialogue again: the one spelling of prompts that differ in outer white space."""
    return prompt_of(messages_of(dialogue(messages_of(prompt), reply_next=True)))


def prompts_in(text: str) -> list[str]:
    """The prompts that a whole dialogue answers, one for each assistant turn, the last one last; none in plain text."""
    if not is_dialogue(text):
        return []
    messages = messages_of(text)
    turns = [turn for turn, message in enumerate(messages) if turn and message["role"] == "assistant"]
    return [prompt_of(messages[:turn]) for turn in turns]


def opening_of(prompt: str) -> str:
    """The first thing the user said: what a dialogue is split and counted by."""
    for message in messages_of(prompt):
        if message["role"] == "user":
            return message["content"].strip()
    return prompt.strip()


def check_messages(value: Any) -> list[Message]:
    """`value` as chat messages; raises UsageProblem (without the place, which the caller knows) where it is none."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UsageProblem("the messages should be a list of objects with role and content", "data/row")
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise UsageProblem("each message should be an object with a role and a text content", "data/row")
        role = message.get("role")
        if not isinstance(role, str) or role not in SPEAKERS:
            raise UsageProblem(f"the role {role!r} of a message is not one of {', '.join(SPEAKERS)}", "data/row")
        messages.append({"role": role, "content": message["content"]})
    return messages


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt, chosen reply and rejected reply of two whole dialogues that share all but the last assistant turn.

    The prompt ends at the last "Assistant:" of the text that both share, so a pair that parts earlier (2 of the 1,800
    in HH harmless-base's test rows) keeps what follows as its replies. Raises UsageProblem (without the place) where
    they share no such turn, or do not differ.
    """
    shared = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        shared += 1
    cut = chosen.rfind(_LAST_WORD, 0, shared)
    if cut < 0 or not is_dialogue(chosen):
        raise UsageProblem(
            'chosen and rejected share no prompt: whole dialogues begin with "\\n\\nHuman: " and differ '
            'in the last "\\n\\nAssistant: " turn, else a prompt column is needed',
            "data/row",
        )
    end = cut + len(_LAST_WORD)
    prompt, good, bad = chosen[:end], chosen[end:].strip(), rejected[end:].strip()
    if good == bad:
        raise UsageProblem("chosen and rejected are the same reply", "data/row")
    return prompt_of(messages_of(prompt)), good, bad


def continues(text: str, prompt: str) -> bool:
    """True where `text` is a whole dialogue that begins with the messages of `prompt`."""
    asked = messages_of(dialogue(messages_of(prompt), reply_next=True))
    return is_dialogue(text) and messages_of(text)[: len(asked)] == asked


def _close_up(content: str) -> str:
    return _MARKER.sub(lambda match: match.group(0)[1:], content)
