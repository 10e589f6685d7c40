"""A data set of the Hugging Face Hub: how an address names it, its commit, and the licence that its card states."""

from dataclasses import dataclass
from functools import cache

from corpus.storage import one_line

HUB = "hub:"
"""What an address on the Hub begins with: hub:NAME or hub:NAME:SPLIT."""

ANSWER_S = 20.0
"""Seconds for the Hub to tell of a data set. House default."""


@dataclass(frozen=True)
class HubCard:
    """What the Hub tells of a data set. `commit` is that of its main branch; None for what is not told, `why` then."""

    commit: str | None = None
    licence: str | None = None
    why: str = ""


def name_and_split(address: str) -> tuple[str, str]:
    """The name and the split that an address on the Hub means; "train" where it does not say."""
    name, _, split = address.removeprefix(HUB).partition(":")
    return name, split or "train"


@cache
def hub_card(name: str) -> HubCard:
    """What the Hub tells of the data set `name`, asked once a process, so that what is read is what is told of.

    A data set that is in the cache can be read without the Hub: that it does not answer is told in `why`, not raised.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(name, timeout=ANSWER_S)
    except Exception as error:  # noqa: BLE001 - errors of the library that it asks with, which is not always the same
        return HubCard(why=one_line(error))
    card = info.card_data
    stated = None if card is None else card.license
    licence = ", ".join(stated) if isinstance(stated, list) else stated
    if licence == "other" and card is not None and card.get("license_name"):
        licence = str(card.get("license_name"))
    return HubCard(info.sha, licence or None)
