import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for the modules that tests share

import pytest
import torch
from recording_worker import RecordingWorker
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import learners.engine  # noqa: F401 (so that gc.freeze sees it)
from learners.process_group import process_group

torch.set_num_threads(1)
gc.freeze()  # every Engine.close collects garbage; what the libraries hold need not be looked through each time


@pytest.fixture(scope="session")
def one_process():
    with process_group():
        yield


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory) -> Path:
    """Tokens 0 to 15: w0 to w12, then <pad> 13, <eos> 14, <unk> 15."""
    words = {f"w{i}": i for i in range(13)} | {"<pad>": 13, "<eos>": 14, "<unk>": 15}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def worker() -> RecordingWorker:
    return RecordingWorker()
