"""Networks that score: our own reward model, and anybody's sequence classifier.

Invariant: the score of a response does not depend on what else is scored with it. A sequence is always computed in a
batch of the same shape, which its own length decides.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from actors.reward_protocol import Tokens, check_scores
from corpus.dialogues import messages_of
from corpus.problems import UsageProblem
from corpus.storage import one_line
from corpus.templates import DIALOGUE_TEMPLATE, PLAIN_TEMPLATE, TemplateName

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

WIDTH_STEP = 32
"""Sequences are padded to a multiple of this many tokens."""


class TrainedReward:
    """Our reward model from its exported Hugging Face directory; it reads the policy's tokens as they are.

    The score is read at the last real token (EOS where the response kept one), the export's "reward_bias" included.
    """

    def __init__(
        self,
        directory: str,
        tokenizer: "PreTrainedTokenizerFast",
        rows_per_batch: int,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        import torch

        from models.build import load_tokenizer
        from models.scalar_head import load_scalar

        self._name = f"reward model {directory}"
        if load_tokenizer(directory).get_vocab() != tokenizer.get_vocab():
            raise UsageProblem(
                f"{self._name}: it was trained with another vocabulary than the policy's.", "reward/vocabulary"
            )
        self._model = load_scalar(directory, getattr(torch, dtype)).to(device).eval().requires_grad_(False)
        self._rows_per_batch = rows_per_batch
        self._device = device

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """See `Reward.score`; the texts are not read."""
        from models.scalar_head import last_token_scores

        def run(tokens: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
            return last_token_scores(self._model(tokens, mask), mask)

        sequences = [[*prompt, *response] for prompt, response in zip(prompt_tokens, response_tokens, strict=True)]
        scores = score_in_fixed_shapes(sequences, run, self._rows_per_batch, pad_id=0, device=self._device)
        return check_scores(scores, len(sequences), self._name)


def check_classifier(model: str) -> None:
    """Raises UsageProblem where a Hugging Face model could not be a reward, as far as can be told without loading its
    weights: its kind and number of labels, the files of a local directory, its tokenizer."""
    from transformers import AutoModelForSequenceClassification

    from models.build import check_weight_files, load_config

    config = load_config(model)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UsageProblem(
            f"reward model {model}: it is of type {config.model_type}, for which Transformers has no sequence "
            "classifier.",
            "model/kind",
        )
    if config.num_labels != 1:
        raise UsageProblem(
            f"reward model {model}: it gives {config.num_labels} numbers; a reward is one.", "reward/labels"
        )
    check_weight_files(model)
    _tokenizer_of(model)


def _tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    from models.build import LOAD_ERRORS

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UsageProblem(
            f"reward model {model}: its tokenizer does not load ({one_line(error)}).", "model/tokenizer"
        ) from error


class HuggingFaceReward:
    """A Hugging Face sequence classifier with one label, which reads the texts through its own tokenizer.

    The conversation is written by that tokenizer's chat template, which is then the authority on special tokens; a
    tokenizer without one gets the dialogue (or plain) text and adds its special tokens itself. What is longer than the
    model's context loses its beginning.
    """

    def __init__(
        self,
        model: str,
        template: TemplateName,
        rows_per_batch: int,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        from models.build import context_length, load_pretrained

        self._name = f"reward model {model}"
        classifier: Any = load_pretrained(AutoModelForSequenceClassification, model, getattr(torch, dtype))
        if classifier.config.num_labels != 1:
            raise UsageProblem(
                f"{self._name}: it gives {classifier.config.num_labels} numbers; a reward is one.", "reward/labels"
            )
        self._tokenizer = _tokenizer_of(model)
        self._tokenizer.truncation_side = "left"
        own = template == "auto" and self._tokenizer.chat_template is not None
        self._template = None if own else PLAIN_TEMPLATE if template == "plain" else DIALOGUE_TEMPLATE
        limits = (context_length(classifier.config), self._tokenizer.model_max_length)  # RoBERTa's are 514 and 512
        self._longest = min(int(limit) for limit in limits if limit is not None)
        self._bias = float(getattr(classifier.config, "reward_bias", 0.0))  # of a model that this program exported
        classifier.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        self._model = classifier.to(device).eval().requires_grad_(False)
        self._rows_per_batch = rows_per_batch
        self._device = device

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """The token ids that this model reads for each prompt with its response.

        Raises UsageProblem where the chat template refuses a conversation (some take no system message, or want users
        and assistants to alternate).
        """
        texts = [self._conversation(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=self._template is not None,
            truncation=True,
            max_length=self._longest,
        )
        return encoded["input_ids"]

    def _conversation(self, prompt: str, response: str) -> str:
        import jinja2

        messages = [*messages_of(prompt), {"role": "assistant", "content": response.strip()}]
        try:
            return self._tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False)
        except jinja2.TemplateError as error:
            raise UsageProblem(
                f"{self._name}: its chat template refuses the prompt that begins {prompt.strip()[:60]!r} ({error}); "
                "give reward.template=dialogue, or leave such prompts out.",
                "model/chat-template",
            ) from error

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """See `Reward.score`; the policy's tokens are not read."""

        def run(tokens: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
            return self._model(input_ids=tokens, attention_mask=mask).logits[:, 0].float() + self._bias

        scores = score_in_fixed_shapes(
            self.encode(prompts, responses),
            run,
            self._rows_per_batch,
            self._tokenizer.pad_token_id,
            self._device,
            self._longest,
        )
        return check_scores(scores, len(prompts), self._name)


def score_in_fixed_shapes(
    sequences: Sequence[Sequence[int]],
    run: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]",
    rows_per_batch: int,
    pad_id: int | None,
    device: str,
    longest: int = sys.maxsize,
) -> list[float]:
    """`run(tokens, mask)` over all sequences, each in a batch whose shape its own length decides.

    A sequence of n tokens is right-padded to the next multiple of 32, or to `longest`. Its batch always has as many
    rows as `rows_per_batch` rows of 64 tokens hold; rows that nothing fills repeat the first. Without a pad id every
    sequence is a batch of its own.
    """
    import torch

    shapes: dict[int, list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        width = len(sequence) if pad_id is None else min(-(-len(sequence) // WIDTH_STEP) * WIDTH_STEP, longest)
        shapes[width].append(row)
    scores = [math.nan] * len(sequences)
    with torch.inference_mode():
        for width, rows in shapes.items():
            height = 1 if pad_id is None else max(1, rows_per_batch * 64 // width)
            for start in range(0, len(rows), height):
                chosen = rows[start : start + height]
                filled = [*chosen, *[chosen[0]] * (height - len(chosen))]
                lengths = torch.tensor([[len(sequences[row])] for row in filled])
                padded = [[*sequences[row], *[pad_id or 0] * (width - len(sequences[row]))] for row in filled]
                mask = torch.arange(width)[None] < lengths
                results = run(torch.tensor(padded, device=device), mask.long().to(device))
                for row, score in zip(chosen, results.tolist(), strict=False):
                    scores[row] = score
    return scores
