"""The world's tokenizer: one token a word, trained on the world's own text."""

from collections.abc import Iterator
from pathlib import Path

from corpus.world.build import World
from corpus.world.lexicon import WORDS

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- ' ' + message['content'] + ' ' + eos_token -}}"
    "{%- else -%}{{- ('' if loop.first else ' ') + 'question : ' + message['content'] + ' answer :' -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""A user's words become a forum's question; the answer follows. No special token stands before the first word."""


def _texts(world: World) -> Iterator[str]:
    yield " ".join(WORDS)
    yield from world.pretraining_train
    for demonstration in world.demonstrations_train:
        yield f"question : {demonstration.prompt} answer : {demonstration.response}"


def write_tokenizer(world: World, directory: str | Path) -> None:
    """Writes a Hugging Face fast tokenizer directory that transformers and vLLM load.

    PAD, EOS and UNK are ids 0, 1 and 2; the others follow by frequency. The vocabulary is every word of the training
    text and every word of the lexicon, so that no text of the world, held-out prompts included, has an unknown word.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=[PAD, EOS, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(_texts(world), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    ).save_pretrained(directory)
