import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models.build import TinyLlamaSettings, tiny_llama

PAD, EOS, WORDS = 0, 1, 50


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS - 3))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def llama():
    settings = TinyLlamaSettings(hidden_size=32, layers=2, heads=2, mlp_size=48, context_length=64)
    return tiny_llama(settings, WORDS, pad_id=PAD, bos_id=None, eos_id=EOS, seed=0)
