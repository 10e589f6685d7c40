"""What one worker reserves, as Ray's bundle and as a person says it."""

from collections.abc import Mapping


def bundle_of(cpus: float, gpus: float = 0.0) -> dict[str, float]:
    """The resources of one worker as Ray's bundle: what it does not need is left out, for Ray refuses zeros."""
    return {name: float(amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}


def spoken_bundle(bundle: Mapping[str, float]) -> str:
    """A bundle for a person: "2 CPUs and 0.5 GPU"."""
    return " and ".join(f"{amount:g} {name}{'s' if amount > 1 else ''}" for name, amount in bundle.items())


def spoken_labels(labels: Mapping[str, str]) -> str:
    """The labels that a node must have, for a person: " on nodes with pool=a"; "" without any."""
    return f" on nodes with {', '.join(f'{key}={value}' for key, value in sorted(labels.items()))}" if labels else ""
