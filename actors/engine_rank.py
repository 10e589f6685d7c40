"""What a generator puts into vLLM's worker processes where an engine's model is divided over several devices: its
weight transport, and an end when the actor has died.

vLLM imports this module in every rank, by its name, before the model is made.
"""

from actors.owner import end_with_owner
from actors.snapshot_transfer import register


class Extension:
    """vLLM asks for a class, whose methods a worker would gain; all there is to do is done by importing it."""


register("object_store")
end_with_owner()
