"""The built-in world's gold judge, as evaluation and held-out samples during PPO call it. Training never does."""

import json


def gold_total(meta: str, response: str) -> float:
    """The gold score of `response` to the prompt that `meta` (JSON) describes; 1 is perfect."""
    return gold_components(meta, response)[0]


def gold_components(meta: str, response: str) -> tuple[float, dict[str, float]]:
    """The gold score and its parts."""
    from corpus.world import gold

    found = gold(json.loads(meta), response)
    return found.total, dict(found.components)
