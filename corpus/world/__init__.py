"""The built-in world: a small language with which the whole of RLHF runs without a download. Everything is synthetic.

`build_world` draws it from one seed; `gold` judges responses (training never sees it); labelers rank them.
Prompts are what users write; the tokenizer's chat template makes `question : PROMPT answer :` of them.
"""

from corpus.world.build import Demonstration, Prompt, World, WorldSettings, build_world
from corpus.world.gold import Gold, gold
from corpus.world.labelers import Labeler, pairwise_agreement
from corpus.world.tokenizer import write_tokenizer

__all__ = [
    "Demonstration",
    "Gold",
    "Labeler",
    "Prompt",
    "World",
    "WorldSettings",
    "build_world",
    "gold",
    "pairwise_agreement",
    "write_tokenizer",
]
