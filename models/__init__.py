"""What is trained: models, snapshots of their weights, exports."""

from corpus.lean_imports import keep_lean

keep_lean()
