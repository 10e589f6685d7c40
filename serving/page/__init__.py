"""The spot-check page: what the models of a run answer to a prompt, side by side, in a browser."""
