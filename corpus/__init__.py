"""What people said: schemas, readers, tokenising, splits, the built-in world."""

from corpus.lean_imports import keep_lean

keep_lean()  # every process of a run imports this package
