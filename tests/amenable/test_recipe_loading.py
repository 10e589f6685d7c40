"""The recipe loader, with small models of its own."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from amenable import recipe_loading
from amenable.recipe import Recipe
from amenable.recipe_loading import find_recipe, load_recipe, packaged_recipes, recipe_hash, resolved
from amenable.run_names import check_run_name
from corpus.problems import UsageProblem


class Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class World(Closed):
    kind: Literal["world"] = "world"
    facts: int = 80


class Files(Closed):
    kind: Literal["files"] = "files"
    path: Path
    hold_out: float = 0.2


class Ppo(Closed):
    batch_size: int = Field(default=512, gt=0)
    minibatches: int = 8
    learning_rate: float = 1e-5
    old_logprobs: Literal["behaviour", "recomputed"] = "behaviour"
    kl_target: float | Literal["off"] = "off"
    top_p: float = 1.0
    widths: list[int] = []

    @model_validator(mode="after")
    def fits(self) -> "Ppo":
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size {self.batch_size} cannot be cut into {self.minibatches} equal minibatches")
        return self


class Judge(Closed):
    name: str
    weight: float = 1.0


class Optimizer(Closed):
    rate: float = Field(default=1e-5, description="Step size at the peak.")
    decay: float = 0.0


class Learner(Closed):
    optimizer: Optimizer = Optimizer(decay=0.3)
    epochs: int = 16


class Run(Closed):
    name: Annotated[str, AfterValidator(check_run_name)]
    directory: Path = Field(default_factory=lambda values: Path("runs") / values["name"])
    learner: Learner = Learner(optimizer=Optimizer(rate=2.0), epochs=2)
    made: Learner = Field(default_factory=lambda: Learner(epochs=3))

    @model_validator(mode="after")
    def fits(self) -> "Run":
        if self.learner.epochs < self.made.epochs - 2:
            raise ValueError(f"learner.epochs {self.learner.epochs} must not be so much below made.epochs")
        return self


class Whole(Closed):
    name: str
    note: str | None = None
    resume: bool = True
    corpus: Annotated[World | Files, Field(discriminator="kind")] = World()
    second: Annotated[World | Files, Field(discriminator="kind")] | None = None
    plain_union: World | Files = World()
    ppo: Ppo = Ppo()
    maybe: Ppo | None = None
    judges: dict[str, Judge] = {}
    panel: list[World | Judge] = []


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str, name: str = "some.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def complaint(path: Path, *overrides: str, model: type[BaseModel] = Whole) -> str:
    with pytest.raises(UsageProblem) as caught:
        load_recipe(path, list(overrides), model)
    return str(caught.value)


def test_a_recipe_overrides_what_it_extends_key_by_key_and_the_command_line_overrides_both(recipe):
    recipe("name: base\nppo: {batch_size: 64, learning_rate: 3e-4}\n", "base.yaml")
    path = recipe("extends: base.yaml\nname: child\nppo:\n  learning_rate: 1e-3\n  widths: [1, 2]\n")
    loaded = load_recipe(path, ["ppo.widths=[5]", "note=~", "resume=false", "ppo.top_p=1"], Whole)
    assert loaded.name == "child"
    assert (loaded.ppo.batch_size, loaded.ppo.learning_rate, loaded.ppo.widths) == (64, 1e-3, [5])
    assert loaded.resume is False
    assert load_recipe(path, [], Whole).resume is True


def test_extends_is_relative_to_the_file_that_says_it_and_may_be_a_chain(recipe, tmp_path, monkeypatch):
    (tmp_path / "deeper").mkdir()
    recipe("name: root\nppo: {minibatches: 2}\n", "root.yaml")
    recipe("extends: root.yaml\nppo: {batch_size: 4}\n", "middle.yaml")
    path = recipe("extends: ../middle.yaml\n", "deeper/leaf.yaml")
    monkeypatch.chdir("/")
    loaded = load_recipe(path, [], Whole)
    assert (loaded.name, loaded.ppo.batch_size, loaded.ppo.minibatches) == ("root", 4, 2)


def test_a_number_without_a_dot_in_its_mantissa_is_a_number(recipe):
    class Loose(BaseModel):
        rate: float | str

    assert load_recipe(recipe("rate: 1e-3\n"), [], Loose).rate == 1e-3
    assert load_recipe(recipe("rate: 1e-3\n"), ["rate=-2E5"], Loose).rate == -2e5
    assert load_recipe(recipe("rate: '1e-3'\n"), [], Loose).rate == "1e-3"


def test_the_later_of_two_overrides_wins(recipe):
    assert load_recipe(recipe("name: a"), ["name=b", "name=c"], Whole).name == "c"


def test_a_value_may_hold_an_equals_sign_and_an_address(recipe):
    assert load_recipe(recipe("name: a"), ["note=s3://bucket/x=1?y=2"], Whole).note == "s3://bucket/x=1?y=2"


def test_a_group_whose_kind_changes_drops_the_keys_of_the_other_kind(recipe):
    path = recipe("name: a\ncorpus: {kind: world, facts: 3}\n")
    assert load_recipe(path, ["corpus.path=x", "corpus.kind=files"], Whole).corpus == Files(path=Path("x"))
    assert load_recipe(path, ["corpus.kind=world"], Whole).corpus == World(facts=3)


def test_a_misspelt_key_names_the_nearest_and_the_file_that_holds_it(recipe):
    recipe("name: base\nppo: {batchsize: 3}\n", "base.yaml")
    path = recipe("extends: base.yaml\nnote: x\n")
    assert complaint(path) == (
        f"{path.parent / 'base.yaml'}: there is no key 'ppo.batchsize'; did you mean 'ppo.batch_size'?"
    )


def test_a_misspelt_override_names_the_command_line(recipe):
    assert complaint(recipe("name: a"), "ppo.learning_rat=1") == (
        "Command line: there is no key 'ppo.learning_rat'; did you mean 'ppo.learning_rate'?"
    )


def test_a_key_in_the_wrong_group_is_found_where_it_belongs(recipe):
    assert "no key 'batch_size'; did you mean 'ppo.batch_size'?" in complaint(recipe("name: a"), "batch_size=3")
    assert "did you mean 'ppo.minibatches'?" in complaint(recipe("name: a"), "corpus.minibatches=3")


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("learner.step_size=3", "learner.optimizer.rate"),
        ("made.Peak=3", "made.optimizer.rate"),
        ("learner.directory_name=3", None),
        ("learner.pea=3", None),
    ],
)
def test_a_key_by_another_name_is_found_by_its_words_in_its_own_group(recipe, override, meant):
    told = complaint(recipe("name: a"), override, model=Run)
    assert ("did you mean" in told) == (meant is not None)
    assert told.endswith(f"did you mean {meant!r}?" if meant else "are: optimizer, epochs.")


def test_the_learning_rate_of_ppo_is_found_by_its_usual_names(recipe):
    for name in ("lr", "learning_rate"):
        assert complaint(recipe("name: a"), f"ppo.{name}=1", model=Recipe).endswith(
            "did you mean 'ppo.policy.peak_lr'?"
        )


def test_a_key_like_no_other_lists_the_keys_of_its_group(recipe):
    assert complaint(recipe("name: a"), "corpus.zzz=3") == (
        "Command line: there is no key 'corpus.zzz'; the keys in 'corpus' are: kind, facts."
    )
    assert "the keys at the top are: name, note, resume" in complaint(recipe("name: a"), "zzz=3")


def test_a_group_is_of_the_default_kind_where_it_does_not_say(recipe):
    assert load_recipe(recipe("name: a"), ["corpus.facts=3"], Whole).corpus == World(facts=3)
    assert load_recipe(recipe("name: a"), ["corpus={kind: files, path: x}"], Whole).corpus == Files(path=Path("x"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("ppo.batch_size=lots", "ppo.batch_size must be a whole number, but the text 'lots' was given."),
        ("ppo.batch_size=1.5", "ppo.batch_size must be a whole number, but 1.5 was given."),
        ("ppo.batch_size=0", "ppo.batch_size must be more than 0, but 0 was given."),
        ("ppo.learning_rate=[1]", "ppo.learning_rate must be a number, but the list [1] was given."),
        ("ppo.widths=3", "ppo.widths must be a list, but 3 was given."),
        ("ppo.widths=[3, x]", "ppo.widths.1 must be a whole number, but the text 'x' was given."),
        ("ppo=3", "ppo must be a group of keys, but 3 was given."),
        ("ppo=", "ppo must be a group of keys, but nothing (null) was given."),
        ("maybe.batch_size=x", "maybe.batch_size must be a whole number, but the text 'x' was given."),
        ("resume=perhaps", "resume must be true or false, but the text 'perhaps' was given."),
        (
            "ppo.old_logprobs=behavior",
            "ppo.old_logprobs must be one of 'behaviour', 'recomputed', but the text 'behavior' was given; "
            "did you mean 'behaviour'?",
        ),
        ("ppo.kl_target=on it", "ppo.kl_target must be a number or 'off', but the text 'on it' was given."),
        ("ppo.top_p.x=1", "ppo.top_p must be a number, but a group of keys was given."),
        ("name=2024", "name must be text, but 2024 was given; quote it twice on the command line"),
        ("name=", "name must be text, but nothing (null) was given."),
        ("ppo.learning_rate=.nan", "ppo.learning_rate must be a finite number, but NaN was given."),
        ("ppo.learning_rate=-.inf", "ppo.learning_rate must be a finite number, but -Infinity was given."),
        ("ppo.learning_rate=1e999", "ppo.learning_rate must be a finite number, but Infinity was given."),
        ("ppo.minibatches=7", "ppo: batch_size 512 cannot be cut into 7 equal minibatches."),
        (
            "corpus.kind=fils",
            "corpus.kind must be one of 'world', 'files', but the text 'fils' was given; did",
        ),
        ("second.facts=3", "the key 'second.kind' is required, but it is not given."),
        ("judges.one.weight=1", "the key 'judges.one.name' is required, but it is not given."),
        ("judges.one.nam=x", "there is no key 'judges.one.nam'; did you mean 'judges.one.name'?"),
        ("plain_union={path: x, hold_out: x}", "plain_union.hold_out must be a number"),
        ("plain_union={path: x, hold_ou: 1}", "no key 'plain_union.hold_ou'; did you mean 'plain_union.hold_out'?"),
        ("panel=[{name: x, wieght: 2}]", "there is no key 'panel.0.wieght'; did you mean 'panel.0.weight'?"),
    ],
)
def test_what_is_wrong_is_said_with_the_key_what_was_given_and_what_is_right(recipe, override, says):
    told = complaint(recipe("name: a"), override)
    assert says in told
    assert "Input should" not in told


def test_a_required_key_that_nobody_gave_is_missed_in_the_recipe_file(recipe):
    path = recipe("note: x\n")
    assert complaint(path, "ppo.batch_size=64") == f"{path}: the key 'name' is required, but it is not given."


def test_a_second_problem_is_named_too(recipe):
    told = complaint(recipe("name: a\nppo: {batch_size: x}\n"), "ppo.top_pp=1", "resume=3")
    assert told.startswith("Command line: there is no key 'ppo.top_pp'")
    assert told.endswith("Also wrong: resume, ppo.batch_size.")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", ", line 2: this is not a valid recipe (the key 'name' is given twice)."),
        ("name: [a\n", ", line 2: this is not a valid recipe ("),
        ("- a\n- b\n", "a recipe is a group of 'key: value' lines"),
        ("3: a\n", "the key 3 is not text"),
        (
            "name: a\nnote: 2026-13-45\n",
            ", line 2: this is not a valid recipe ('2026-13-45' cannot be read as timestamp).",
        ),
        ("name: !!int abc\n", ", line 1: this is not a valid recipe ('abc' cannot be read as int)."),
        ("name: !!bool abc\n", ", line 1: this is not a valid recipe ('abc' cannot be read as bool)."),
        ("name: !!timestamp abc\n", "cannot be read as timestamp"),
        (f"name: {'[' * 3000}\n", "this is not a valid recipe (its brackets or groups are nested too deeply)."),
        ("name: !!python/object/apply:os.system ['true']\n", "this is not a valid recipe"),
        ("extends: nowhere.yaml\n", "it extends 'nowhere.yaml', but there is no file"),
        ("extends: [a.yaml, b.yaml]\n", "'extends' must name one YAML file"),
        ("extends: some.yaml\n", "the recipes extend each other in a circle"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_recipe_says_why_and_where(recipe, text, says):
    path = recipe(text)
    told = complaint(path)
    assert told.startswith(str(path))
    assert says in told


def test_yaml_merge_keys_may_be_overridden(recipe):
    path = recipe("name: a\nppo: &p {batch_size: 16}\nmaybe: {<<: *p, batch_size: 32}\n")
    assert load_recipe(path, [], Whole).maybe == Ppo(batch_size=32)


def test_a_file_that_is_not_text_says_so(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert complaint(path) == f"{path}: the recipe is not UTF-8 text."


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", ".a=1", "a.=1", "a b =1"])
def test_an_override_without_a_key_and_a_value_is_refused(recipe, override):
    assert f"{override!r} is not an override; write key=value" in complaint(recipe("name: a"), override)


def test_an_override_whose_value_is_broken_yaml_is_refused(recipe):
    assert "the value in 'note=[1' cannot be read" in complaint(recipe("name: a"), "note=[1")


def test_a_long_override_is_shown_in_part(recipe):
    told = complaint(recipe("name: a"), f"note={'[' * 3000}")
    assert "nested too deeply" in told
    assert len(told) < 300


def test_a_recipe_that_may_not_be_reached_is_one_sentence(recipe, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    path = recipe("name: a\nextends: other.yaml\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refuse)
        assert complaint("/srv/locked/a.yaml") == (
            "/srv/locked/a.yaml: the recipe cannot be reached (Permission denied)."
        )
    assert complaint(f"{'x' * 300}.yaml").endswith("the recipe cannot be reached (File name too long).")
    assert complaint("~no-such-person/a.yaml").startswith("~no-such-person/a.yaml: the path cannot be understood")
    assert "it extends 'other.yaml', but there is no file" in complaint(path), "negative control: this one is reached"


def test_a_packaged_recipe_is_found_by_name_and_a_file_comes_first(tmp_path, monkeypatch):
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    (packaged / "demo.yaml").write_text("# The demo. More words.\nname: demo\n")
    monkeypatch.setattr(recipe_loading.resources, "files", lambda _: packaged)
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo") == packaged / "demo.yaml"
    assert [(found.name, found.says) for found in packaged_recipes()] == [("demo", "The demo")]
    with pytest.raises(UsageProblem, match="There is no recipe file 'dmo'; did you mean the packaged recipe 'demo'"):
        find_recipe("dmo")
    with pytest.raises(UsageProblem, match="the packaged recipes are: demo"):
        find_recipe("runs/xyz")
    (tmp_path / "demo").write_text("name: mine\n")
    assert find_recipe("demo") == Path("demo")


def test_a_directory_is_not_a_recipe(tmp_path):
    with pytest.raises(UsageProblem, match="is a directory, not a recipe"):
        find_recipe(tmp_path)


def test_the_resolved_recipe_states_every_default_and_reads_back_equal(recipe):
    path = recipe("name: '1e-3'\nmaybe: {batch_size: 8}\ncorpus: {kind: files, path: naïve/dir}\n")
    loaded = load_recipe(path, [], Whole)
    text = resolved(loaded)
    assert "old_logprobs: behaviour" in text
    assert "hold_out: 0.2" in text
    again = load_recipe(recipe(text, "again.yaml"), [], Whole)
    assert again == loaded
    assert again.name == "1e-3"


def test_the_hash_sees_values_not_the_order_or_whether_a_default_was_written(recipe):
    path = recipe("ppo: {batch_size: 512}\nname: a\n")
    assert recipe_hash(load_recipe(path, [], Whole)) == recipe_hash(Whole(name="a"))
    assert recipe_hash(Whole(name="a")) != recipe_hash(Whole(name="b"))
    assert recipe_hash(Whole(name="a")) != recipe_hash(Whole(name="a", ppo=Ppo(top_p=0.9)))


def test_a_run_goes_to_a_directory_of_its_name_unless_told_otherwise(recipe):
    path = recipe("name: first\n")
    assert load_recipe(path, [], Run).directory == Path("runs/first")
    assert load_recipe(path, ["directory=/elsewhere"], Run).directory == Path("/elsewhere")


def test_a_group_given_in_part_keeps_the_recipes_own_defaults_for_the_rest(recipe):
    loaded = load_recipe(recipe("name: a\nlearner: {epochs: 5}\n"), ["made.optimizer.rate=4"], Run)
    assert loaded.learner == Learner(optimizer=Optimizer(rate=2.0), epochs=5)
    assert loaded.made == Learner(optimizer=Optimizer(rate=4.0, decay=0.3), epochs=3)
    assert load_recipe(recipe("name: a"), [], Run).learner == Learner(optimizer=Optimizer(rate=2.0), epochs=2)


def test_a_misfit_between_groups_is_laid_to_the_source_that_made_it(recipe):
    path = recipe("name: a\nmade: {epochs: 9}\nlearner: {epochs: 8}\n")
    assert complaint(path, "learner.epochs=3", model=Run) == (
        "Command line: learner.epochs 3 must not be so much below made.epochs."
    )
    path = recipe("name: a\nmade: {epochs: 9}\n")
    assert complaint(path, "learner.optimizer.rate=3", model=Run).startswith(f"{path}: learner.epochs 2 must")


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "", ".hidden", "x" * 101, "a\\nb"])
def test_a_run_name_cannot_lead_out_of_its_directory(recipe, name):
    told = complaint(recipe(f'name: "{name}"\n'), model=Run)
    assert "cannot be the name of a run" in told
    assert "directory." not in told


@pytest.mark.parametrize(
    ("betas", "says"),
    [
        ("[0.9, 1.5]", "betas.1 must be less than 1.0, but 1.5 was given"),
        ("[0.9, 1]", "betas.1 must be less than 1.0, but 1 was given"),
        ("[-0.1, 0.9]", "betas.0 must be at least 0.0, but -0.1 was given"),
    ],
)
def test_betas_that_adam_cannot_use_are_told_with_where_they_were_given(betas, says):
    with pytest.raises(UsageProblem) as caught:
        load_recipe("demo", [f"ppo.policy.betas={betas}"], Recipe)
    assert str(caught.value) == f"Command line: ppo.policy.{says}."
    assert load_recipe("demo", ["ppo.policy.betas=[0, 0.999]"], Recipe).ppo.policy.betas == (0.0, 0.999)


def test_a_seed_is_what_torch_and_numpy_take():
    with pytest.raises(UsageProblem, match=r"^Command line: seed must be at most 4294967295, but 4294967296 was given"):
        load_recipe("demo", ["seed=4294967296"], Recipe)
    assert load_recipe("demo", ["seed=4294967295"], Recipe).seed == 2**32 - 1


@pytest.mark.parametrize("given", ["deadline_s=.inf", "learners.gpus=.nan", "reward.timeout_s=.inf"])
def test_what_is_not_finite_is_refused_by_the_recipe(given):
    with pytest.raises(UsageProblem, match="must be a finite number"):
        load_recipe("demo", [given], Recipe)
