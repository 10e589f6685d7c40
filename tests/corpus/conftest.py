"""One small byte-level tokenizer for all tests of the corpus."""

import pytest

from corpus.tokenising import train_bpe_tokenizer

TEXTS = [
    "one special quick brown fox jumps over a lazy dog",
    "\n\nHuman: hello there\n\nAssistant: hello world, how are you?",
    "the world is round, hello world",
] * 20


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe_tokenizer(TEXTS, 300, directory)
    return directory


@pytest.fixture
def tokenizer(tokenizer_directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_directory)
