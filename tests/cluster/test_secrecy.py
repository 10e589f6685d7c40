"""Secrets are refused wherever they would be seen, ordinary words are not, and no sentence repeats one."""

import pytest

from amenable.recipe import Recipe
from cluster.secrecy import check_no_secret, check_override, check_variable, is_secret_name, secret_shape
from corpus.problems import UsageProblem

CANARY = "zq7-canary-4b1f"
HUGGING_FACE = "hf_" + "aB3" * 8


@pytest.mark.parametrize(
    "override",
    [
        f"reward.url=https://host/score?access_token={CANARY}",
        "corpus.path=s3://key:word@bucket/data",
        f"model.base={HUGGING_FACE}",
        "name=AKIA" + "A1B2" * 4,
        "api_key=x",
        "reward.password=x",
        "reward.headers.Token=x",
        "name=sk-" + "a1b2c3d4" * 3,
        "name=ghp_" + "a1B2" * 8,
        "name=amn_0123456789ab_" + "x" * 30,
        "name=-----BEGIN OPENSSH PRIVATE KEY-----",
        "name='Bearer abcdefghijklmnop'",
        "name=eyJhbGciOiJI.eyJzdWIiOiIx.x",
    ],
)
def test_an_override_that_looks_like_a_secret_is_refused_and_not_repeated(override):
    with pytest.raises(UsageProblem, match="dashboard") as caught:
        check_override(override, {})
    value = override.partition("=")[2]
    assert len(value) < 4 or value not in str(caught.value)
    assert "--env NAME" in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "seed=7",
        "tokens.max_prompt_tokens=64",
        "corpus.path=s3://bucket/data?region=eu",
        "model.base=org/model-7b",
        "x=",
    ],
)
def test_an_ordinary_override_passes(override):
    check_override(override, {})


def test_the_value_of_a_secret_variable_is_found_wherever_it_stands():
    told = {"metadata": {"run": "a"}, "arguments": ["x", f"model.base=/models/{CANARY}/7b"]}
    check_no_secret(told, {"PATH": CANARY, "SHORT_TOKEN": "a"})
    with pytest.raises(UsageProblem, match=r"^arguments .* value of WANDB_API_KEY in it") as caught:
        check_no_secret(told, {"WANDB_API_KEY": CANARY})
    assert CANARY not in str(caught.value)


def test_no_field_of_a_recipe_is_taken_for_a_secret():
    check_no_secret(Recipe(name="plain").model_dump(mode="json"), {})


def test_names_of_secrets_are_whole_words():
    for name in ("HF_TOKEN", "token", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PWD", "db.password"):
        assert is_secret_name(name), name
    for name in ("tokens", "context_tokens", "TOKENIZERS_PARALLELISM", "keyboard", "author", "PWD", "OLDPWD"):
        assert not is_secret_name(name), name
    assert secret_shape("https://host:8265/a") is None


def test_a_variable_is_named_and_never_given():
    assert check_variable("HF_TOKEN") == "HF_TOKEN"
    with pytest.raises(
        UsageProblem, match=r"--env HF_TOKEN=… gives a value.*set HF_TOKEN in the environment"
    ) as caught:
        check_variable(f"HF_TOKEN={CANARY}")
    assert CANARY not in str(caught.value)
    for given in (HUGGING_FACE, "a b", "", "1A", CANARY):
        with pytest.raises(UsageProblem, match="was given something else") as caught:
            check_variable(given)
        assert not given or given not in str(caught.value)


def test_a_variable_that_names_a_file_is_no_secret(tmp_path):
    key = tmp_path / "key.json"
    told = {"working_dir": str(key)}
    environment = {"GOOGLE_APPLICATION_CREDENTIALS": str(key)}
    key.write_text("{}")
    check_no_secret(told, environment)
    key.unlink()
    with pytest.raises(UsageProblem, match="value of GOOGLE_APPLICATION_CREDENTIALS"):
        check_no_secret(told, environment)
