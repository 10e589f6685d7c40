"""The reward of the toy run."""


def count_threes(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward: how often a response says "w3"."""
    return [float(response.split().count("w3")) for response in responses]
