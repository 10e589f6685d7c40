"""The stages of a run: what each reads, what it does, what it leaves behind."""
