"""What the Hugging Face Hub tells of a data set or a model: the commit, and the licence that a data set's card states.

A name alone hides that its contents changed: the commit does not.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from corpus.storage import one_line

HUB = "hub:"
"""What an address on the Hub begins with: hub:NAME or hub:NAME:SPLIT."""

ANSWER_S = 20.0
"""Seconds for the Hub to tell of a data set or a model. House default."""


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


@cache
def model_commit(name: str) -> str | None:
    """The commit of the main branch of the model `name`, asked once a process; where the Hub does not answer, that of
    the copy in this machine's cache, which is then what loads. None where neither tells."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name, timeout=ANSWER_S).sha
    except Exception:  # noqa: BLE001 - as above
        return _cached_commit(name)


def _cached_commit(name: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    try:
        return Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "refs", "main").read_text() or None
    except OSError:
        return None
