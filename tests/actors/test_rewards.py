"""The four rewards, what they refuse, and that docs/rewards.md runs."""

import json
import math
import random
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from actors.rewards import (
    FunctionReward,
    HTTPReward,
    HuggingFaceReward,
    RewardSettings,
    TrainedReward,
    check_reward,
    make_reward,
)
from corpus.problems import RunProblem, UsageProblem
from corpus.templates import encode_prompts, encode_responses
from corpus.tokenising import train_bpe_tokenizer
from models.build import TinyLlamaSettings, load_tokenizer, tiny_llama
from models.scalar_head import ScalarHeadModel

DOC = Path(__file__).parents[2] / "docs" / "rewards.md"
PROMPTS = [
    "hello",
    "what is the capital of France and why",
    "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
] * 7
RESPONSES = [" ".join(["word"] * (number % 8 + 1)) for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An exported reward model of ours with random weights and a bias of 0.75."""
    path = tmp_path_factory.mktemp("reward-model")
    tokenizer = train_bpe_tokenizer(["hello world, what is the capital of France"] * 5, 280, path / "tokenizer")
    settings = TinyLlamaSettings(hidden_size=32, layers=2, heads=2, mlp_size=48, context_length=128)
    llama = tiny_llama(settings, len(tokenizer), pad_id=0, bos_id=1, eos_id=2, seed=0)
    ScalarHeadModel(llama.model, seed=1).save_reward_model(path / "export", tokenizer, bias=0.75)
    return str(path / "export")


@pytest.fixture
def tokenizer(directory):
    return load_tokenizer(directory)


def score(reward, tokenizer, rows=None):
    prompts = [PROMPTS[row] for row in rows] if rows is not None else PROMPTS
    responses = [RESPONSES[row] for row in rows] if rows is not None else RESPONSES
    return reward.score(prompts, responses, encode_prompts(tokenizer, prompts), encode_responses(tokenizer, responses))


def test_the_trained_reward_is_transformers_score_at_the_last_token_plus_the_bias(directory, tokenizer):
    from transformers import AutoModelForSequenceClassification

    scores = score(TrainedReward(directory, tokenizer, rows_per_batch=2), tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    for row in (0, 1, 2):
        tokens = encode_prompts(tokenizer, [PROMPTS[row]])[0] + encode_responses(tokenizer, [RESPONSES[row]])[0]
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits.item() + 0.75
        assert scores[row] == pytest.approx(expected, abs=1e-5)
    assert len({round(number, 4) for number in scores}) == len(scores), "negative control: the scores differ"


@pytest.mark.parametrize("kind", [TrainedReward, HuggingFaceReward])
def test_a_score_does_not_depend_on_its_neighbours_bit_for_bit(kind, directory, tokenizer):
    reward = kind(directory, tokenizer if kind is TrainedReward else "auto", rows_per_batch=2)
    scores = score(reward, tokenizer)
    order = list(range(len(PROMPTS)))
    random.Random(0).shuffle(order)
    assert score(reward, tokenizer, order) == [scores[row] for row in order]
    assert score(reward, tokenizer, [5]) == [scores[5]]
    assert score(reward, tokenizer, [3, 3, 9]) == [scores[3], scores[3], scores[9]]


def test_no_responses_have_no_scores(directory, tokenizer):
    for reward in (TrainedReward(directory, tokenizer, 4), HuggingFaceReward(directory, "auto", 4)):
        assert reward.score([], [], [], []) == []


def test_another_vocabulary_is_refused(directory, tmp_path):
    other = train_bpe_tokenizer(["entirely different letters"], 270, tmp_path)
    with pytest.raises(UsageProblem, match="another vocabulary"):
        TrainedReward(directory, other, 4)


def test_a_hugging_face_reward_writes_the_conversation_as_its_tokenizer_says(directory, tokenizer):
    # Our own export, read as anybody's model: the conversation ends without EOS, as its template writes none.
    reward = HuggingFaceReward(directory, "auto", 4)
    assert reward.encode([PROMPTS[2]], ["d "]) == [
        tokenizer("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d")["input_ids"]
    ]
    tokens = encode_prompts(tokenizer, PROMPTS), encode_responses(tokenizer, RESPONSES, end=False)
    trained = TrainedReward(directory, tokenizer, 4).score(PROMPTS, RESPONSES, *tokens)
    assert reward.score(PROMPTS, RESPONSES, [], []) == pytest.approx(trained, abs=1e-5)
    plain = HuggingFaceReward(directory, "plain", 4)
    assert plain.encode(["a"], ["b"]) == [tokenizer("a b")["input_ids"]]


def test_a_classifier_with_special_tokens_of_its_own_gets_them_once(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "human", "assistant", ":", "hello", "hi"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    reward = HuggingFaceReward(str(tmp_path), "auto", 4)
    assert reward.encode(["hello"], ["hi"]) == [[2, 5, 7, 8, 6, 7, 9, 3]]
    (long,) = reward.encode(["hello " * 30], ["hi"])
    assert (len(long), long[0], long[-4:]) == (12, 2, [6, 7, 9, 3]), "what is too long loses its beginning"
    assert len(set(reward.score(["hello", "hello " * 30], ["hi", "hi"], [], []))) == 2


def test_a_classifier_without_a_pad_token_scores_row_by_row(directory, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    scores = HuggingFaceReward(str(tmp_path), "auto", 4).score(PROMPTS, RESPONSES, [], [])
    assert scores == pytest.approx(HuggingFaceReward(directory, "auto", 4).score(PROMPTS, RESPONSES, [], []), abs=1e-5)


def test_a_classifier_with_two_labels_is_refused(directory, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageProblem, match="gives 2 numbers"):
        HuggingFaceReward(str(tmp_path), "auto", 4)


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"scorer_{tmp_path.name.replace('-', '_')}"

    def write(code):
        (tmp_path / f"{name}.py").write_text(code)
        return name

    yield write
    sys.modules.pop(name, None)


def test_a_function_in_the_working_directory_is_called_with_the_texts(module):
    name = module("def count(prompts, responses):\n    return [len(p) - len(r) for p, r in zip(prompts, responses)]\n")
    assert FunctionReward(f"{name}:count").score(["abc", "d"], ["x", "yz"], [], []) == [2.0, -1.0]


def test_a_function_that_is_not_there_is_a_usage_problem(module):
    with pytest.raises(UsageProblem, match="cannot be imported"):
        FunctionReward("no_such_module:f")
    with pytest.raises(UsageProblem, match="has no function f"):
        FunctionReward(module("g = 1\n") + ":f")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def f(:\n", "SyntaxError: "),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('bye')\n", "SystemExit: bye"),
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'"),
    ],
)
def test_a_module_that_fails_as_it_is_imported_is_a_usage_problem(module, code, says):
    with pytest.raises(UsageProblem, match=rf"reward function .*:f: the module cannot be imported \({says}"):
        FunctionReward(module(code) + ":f")


@pytest.mark.parametrize("name", [":f", "module:", "module", "a:b:c", ":"])
def test_a_name_that_is_not_module_and_function_is_refused(name):
    with pytest.raises(ValidationError, match="should be 'module:function'"):
        RewardSettings(kind="function", function=name)


def test_a_function_that_raises_ends_the_run_with_what_and_where(module):
    name = module("def f(prompts, responses):\n    return [1 / 0 for _ in responses]\n")
    says = rf"^reward function {name}:f: it raised ZeroDivisionError: division by zero \(.*{name}\.py:2\)\.$"
    with pytest.raises(RunProblem, match=says):
        FunctionReward(f"{name}:f").score(["a"], ["b"], [], [])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_settings_that_are_not_finite_are_refused(number):
    with pytest.raises(ValidationError, match="finite"):
        RewardSettings(kind="http", url="http://localhost", deadline_s=number)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://", "should name a host"),
        ("http:///score", "should name a host"),
        ("http://localhost:0", "should name a host"),
        ("http://localhost:99999", "no web address"),
        ("ftp://localhost", "should begin with http"),
    ],
)
def test_an_address_without_a_host_or_with_an_impossible_port_is_refused(url, says):
    with pytest.raises(UsageProblem, match=says):
        HTTPReward(url, 1, 1.0, 1.0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[0.0]", "returned 1 scores for 2 responses"),
        ("[0.0, float('nan')]", "response 1 of 2 is nan"),
        ("[float('-inf'), 0]", "response 0 of 2 is -inf"),
        ("['good', 'bad']", "should return a list of 2 numbers"),
        ("None", "should return a list of 2 numbers"),
    ],
)
def test_scores_that_are_no_finite_numbers_end_the_run_naming_the_scorer(module, returned, message):
    reward = FunctionReward(module(f"def f(prompts, responses):\n    return {returned}\n") + ":f")
    with pytest.raises(RunProblem, match=rf"reward function .*:f: .*{message}"):
        reward.score(["a", "b"], ["c", "d"], [], [])


@contextmanager
def service(*answers):
    """A server that gives the answers (status, body) in turn, the last for ever. Yields its address and requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            status, answer = answers[min(len(requests), len(answers)) - 1]
            content = (answer if isinstance(answer, str) else answer(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def lengths(body):
    return json.dumps({"scores": [len(text) for text in body["responses"]]})


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


def test_a_service_is_asked_in_batches_and_answers_in_order():
    with service((200, lengths)) as (url, requests):
        scores = HTTPReward(url, 2, timeout_s=5, deadline_s=5).score(["p"] * 3, ["a", "bb", "ccc"], [], [])
    assert scores == [1, 2, 3]
    assert requests[0] == {"prompts": ["p", "p"], "responses": ["a", "bb"]}


def test_a_service_that_is_briefly_down_is_asked_again():
    with service((503, "starting"), (200, lengths)) as (url, requests):
        assert HTTPReward(url, 8, timeout_s=5, deadline_s=5).score(["p"], ["abc"], [], []) == [3]
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (500, "broken", r"no scores within 0\.1 s; at last, it answered 500 'broken'"),
        (404, "no such page", "it answered 404 'no such page'"),
        (200, "hello", "not JSON with a list"),
        (200, '{"rewards": [1]}', "not JSON with a list"),
        (200, '{"scores": [1, 2]}', "returned 2 scores for 1 responses"),
        (200, '{"scores": [NaN]}', "response 0 of 1 is nan"),
    ],
)
def test_a_service_that_answers_wrongly_ends_the_run_naming_it(status, answer, message):
    with (
        service((status, answer)) as (url, requests),
        pytest.raises(RunProblem, match=f"reward service {url}: .*{message}"),
    ):
        HTTPReward(url, 8, timeout_s=5, deadline_s=0.1).score(["p"], ["a"], [], [])
    assert len(requests) == 1


def test_a_service_that_is_not_there_or_never_answers_meets_the_deadline():
    with service((200, lengths)) as (url, _):
        pass
    with pytest.raises(RunProblem, match=r"no scores within 0\.1 s; at last, ConnectError"):
        HTTPReward(url, 8, timeout_s=5, deadline_s=0.1).score(["p"], ["a"], [], [])
    released = threading.Event()
    with service((200, lambda body: lengths(body) if released.wait(5) else "")) as (url, _):
        with pytest.raises(RunProblem, match="at last, ReadTimeout"):
            HTTPReward(url, 8, timeout_s=0.05, deadline_s=0.1).score(["p"], ["a"], [], [])
        released.set()


@contextmanager
def guarded(token):
    """A service that scores for whoever has the token, and repeats to others what they sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent = self.headers.get("Authorization", "nothing")
            is_right = sent == f"Bearer {token}"
            content = (lengths(body) if is_right else f"not for {sent}").encode()
            self.send_response(200 if is_right else 401)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_token_of_the_environment_is_sent_and_told_nowhere(monkeypatch):
    def asked(variable=None):
        return HTTPReward(url, 8, 5, 5, variable).score(["p"], ["ab"], [], [])

    with guarded("zq7-right-token") as url:
        monkeypatch.setenv("REWARD_TOKEN", "zq7-right-token\n")
        assert asked("REWARD_TOKEN") == [2]
        monkeypatch.setenv("REWARD_TOKEN", "zq7-wrong-token")
        with pytest.raises(RunProblem, match=r"it answered 401 'not for Bearer …'\.$"):
            asked("REWARD_TOKEN")
        with pytest.raises(RunProblem, match="not for nothing"):
            asked()


@pytest.mark.parametrize(
    ("value", "says"), [("", "has no REWARD_TOKEN"), ("zq7 canary", "has blanks"), ("zq7-é", "has blanks or no ASCII")]
)
def test_a_token_that_is_not_there_or_cannot_be_one_is_a_usage_problem(monkeypatch, value, says):
    monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(UsageProblem, match=says) as caught:
        check_reward(RewardSettings(kind="http", url="http://127.0.0.1:9/score", token_variable="REWARD_TOKEN"))
    assert "zq7" not in str(caught.value)


def test_an_address_that_is_none_is_a_usage_problem():
    with pytest.raises(UsageProblem, match="http:// or https://"):
        HTTPReward("ftp://host/score", 8, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "huggingface"}, "kind huggingface needs model"),
        ({"kind": "http", "function": "a:b", "url": "http://x"}, "function is for kind function"),
        ({"kind": "trained", "model": "x"}, "model is for kind huggingface"),
        ({"kind": "function", "function": "module.function"}, "module:function"),
        ({"kind": "magic"}, "trained"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardSettings.model_validate(settings)


def test_a_trained_reward_without_a_directory_is_a_usage_problem(tokenizer):
    with pytest.raises(UsageProblem, match="this run has none"):
        make_reward(RewardSettings(), None, tokenizer, 4)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), re.DOTALL)


def test_the_docs_examples_run(directory, tokenizer, module, monkeypatch):
    trained, huggingface, function, http = blocks("python")
    for code in (trained, huggingface):
        names: dict = {"directory": directory}
        exec(compile(code, str(DOC), "exec"), names)
        assert len(names["scores"]) == 2
        assert all(math.isfinite(number) for number in names["scores"])
    name = module(function)
    short, long = FunctionReward(f"{name}:brevity").score(["a", "a"], ["b", "a a a"], [], [])
    assert short > long
    names = {}
    exec(compile(http.replace("8080", "0"), str(DOC), "exec"), names)
    server = names["server"]
    monkeypatch.setattr(names["Scorer"], "log_message", lambda *_: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    scores = HTTPReward(f"http://127.0.0.1:{server.server_address[1]}/score", 8, 5, 5).score(["a"], ["x" * 50], [], [])
    server.shutdown()
    server.server_close()
    assert scores == [-0.5]


def test_the_docs_recipes_are_valid_and_make_the_rewards_they_say(directory, tokenizer, module):
    name = module("def brevity(prompts, responses):\n    return [0.0] * len(responses)\n")
    made = []
    for text in blocks("yaml"):
        settings = RewardSettings.model_validate(yaml.safe_load(text)["reward"])
        if settings.kind == "huggingface":
            settings = settings.model_copy(update={"model": directory})
        if settings.kind == "function":
            settings = settings.model_copy(update={"function": f"{name}:brevity"})
        made.append(type(make_reward(settings, directory, tokenizer, 4)))
    assert made == [TrainedReward, HuggingFaceReward, FunctionReward, HTTPReward]
