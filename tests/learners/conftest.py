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

from learners.process_group import process_group

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def one_process():
    """The process group of one rank. Imports what engines import late, then keeps it out of garbage collection: every
    `Engine.close` collects, and looking through the libraries each time would take most of the tests' time."""
    import learners.language_model  # noqa: F401
    from learners.engine import Engine
    from learners.engine_settings import EngineSettings
    from learners.optimizer import OptimizerSettings

    with process_group():
        Engine(torch.nn.Linear(2, 2), EngineSettings(zero_stage=1), OptimizerSettings(peak_lr=0.0), 0).close()
        gc.freeze()
        yield
        gc.unfreeze()


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
