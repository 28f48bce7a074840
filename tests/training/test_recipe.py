"""Recipes: the shipped three, typed overrides, refusals that name the nearest key, stable text and hash."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import SpecdecError
from training.recipe import Recipe, load_recipe, parse_recipe, recipe_names
from training.sections import DataSection, OptimizerSection, TrainerSection, UnrollSection


@pytest.mark.parametrize("name", ["cpu", "gpu", "large"])
def test_shipped_recipes_load_and_survive_their_own_yaml(name: str) -> None:
    recipe = load_recipe(name)
    assert name in recipe_names()
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert parse_recipe(recipe.to_yaml()).hash() == recipe.hash()
    assert not recipe.differences(parse_recipe(recipe.to_yaml()))


def test_large_is_the_papers_recipe() -> None:
    large = load_recipe("large")
    assert (large.unroll.steps, large.unroll.decay, large.optimizer.lr) == (7, 0.8, 1e-4)
    assert (large.data.max_length, large.vocab.size, large.unroll.curriculum) == (4096, 32000, ())


def test_the_options_are_frozen() -> None:
    """A new field, or a lost one, is a change to what users write."""
    options = {section: list(values) for section, values in parse_yaml(Recipe().to_yaml()).items()}
    assert options == {
        "data": ["prompts", "max_length", "licences", "limit", "answers"],
        "responses": ["max_tokens", "sampled_fraction", "temperature", "batch", "max_minutes"],
        "vocab": ["size"],
        "head": ["taps", "intermediate_size", "num_heads", "num_key_value_heads", "fc_norm", "norm_output",
                 "norm_before_residual", "norm_before_fc", "start"],
        "unroll": ["steps", "decay", "curriculum", "checkpointing", "noise"],
        "loss": ["kind", "lk_rate", "gradient", "prompt_weight"],
        "optimizer": ["name", "lr", "matrix_lr", "betas", "weight_decay", "warmup_fraction", "schedule", "clip"],
        "trainer": ["batch_tokens", "accumulation", "precision", "epochs", "max_minutes", "max_tokens", "seed",
                    "save_every_minutes", "tracker"],
        "cache": ["gigabytes"],
        "evaluation": ["every_minutes", "prompts", "max_tokens"],
    }  # fmt: skip
    assert [f.name for f in fields(Recipe)] == list(options)


def parse_yaml(text: str) -> dict[str, dict[str, object]]:
    import yaml

    parsed: dict[str, dict[str, object]] = yaml.safe_load(text)
    return parsed


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.lr = 1", 1.0),
        ("optimizer.betas=[0.9, 0.99]", (0.9, 0.99)),
        ("optimizer.betas=0.9,0.99", (0.9, 0.99)),
        ("optimizer.clip=null", None),
        ("optimizer.clip=none", None),
        ("vocab.size=none", None),
        ("vocab.size=8192", 8192),
        ("head.taps=default", "default"),
        ("head.taps=[2, 15, 27]", (2, 15, 27)),
        ("head.taps=2,15", (2, 15)),
        ("head.fc_norm=true", True),
        ("unroll.curriculum=[[0, 1], [0.5, 3]]", ((0.0, 1), (0.5, 3))),
        ("data.licences=MIT,Apache-2.0", ("MIT", "Apache-2.0")),
        ("data.licences=MIT", ("MIT",)),
        ("data.prompts=my file=1.jsonl", "my file=1.jsonl"),
        ("data.prompts=[odd", "[odd"),
        ("cache.gigabytes=1e1", 10.0),
        ("trainer.epochs=1e1", 10),
        ("loss.kind=lk", "lk"),
        ("trainer.tracker=none", "none"),
    ],
)
def test_overrides_take_the_fields_type(override: str, expected: object) -> None:
    section, name = override.split("=")[0].strip().split(".")
    value = getattr(getattr(load_recipe("cpu", [override]), section), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate"),
        ("optimiser.lr=1", "Did you mean optimizer?"),
        ("unroll.step=1", "Did you mean steps?"),
        ("optimizer.lr=fast", "a finite number"),
        ("cache.gigabytes=inf", "a finite number"),
        ("trainer.max_minutes=.inf", "a finite number or null"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.lr=0", "optimizer.lr"),
        ("optimizer.lr=[1]", "a finite number"),
        ("head.taps={a: 1}", "a list of a whole number or default"),
        ("optimizer.betas=0.9", "optimizer.betas"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas"),
        ("trainer.epochs=1.5", "a whole number"),
        ("trainer.epochs=true", "a whole number"),
        ("trainer.max_minutes=0", "trainer.max_minutes"),
        ("trainer.seed=-1", "trainer.seed"),
        ("trainer.batch_tokens=100", "trainer.batch_tokens or lower data.max_length"),
        ("head.fc_norm=1", "true or false"),
        ("head.taps=[3, 2]", "rising"),
        ("head.taps=[]", "rising"),
        ("head.num_key_value_heads=0", "head.num_key_value_heads"),
        ("loss.kind=ce", "kl, tv, lk"),
        ("unroll.curriculum=[[0.1, 1]]", "rise from 0"),
        ("unroll.curriculum=[[0, 9]]", "unroll.steps = 4"),
        ("unroll.decay=0", "unroll.decay"),
        ("responses.sampled_fraction=1.1", "from 0 to 1"),
        ("responses.temperature=0", "responses.temperature"),
        ("data.licences=[]", "data.licences"),
        ("data.licences=[MIT,", "a list of text or null"),  # what a shell leaves of [MIT, Apache-2.0]
        ("head.taps=[2,15", "head.taps"),
        ("optimizer.betas=0.9,'x", "optimizer.betas"),
        ("trainer.epochs=2024-99-99", "a whole number"),
        ("trainer.max_tokens=" + "1" * 400, "a whole number or null"),
        ("optimizer.lr=" + "1" * 5000, "a finite number"),
        ("data.max_length=1", "data.max_length"),
        ("vocab.size=1", "vocab.size"),
        ("cache.gigabytes=-1", "cache.gigabytes"),
        ("evaluation.every_minutes=0", "evaluation.every_minutes"),
        ("epochs=3", "section.field=value"),
        ("trainer.epochs", "section.field=value"),
    ],
)
def test_refusals_name_the_field_and_the_way_out(override: str, words: str) -> None:
    with pytest.raises(SpecdecError) as caught:
        load_recipe("cpu", [override])
    assert words in str(caught.value)


def test_heads_and_norms_are_checked_together() -> None:
    with pytest.raises(SpecdecError, match="divisor of 8"):
        load_recipe("cpu", ["head.num_heads=8", "head.num_key_value_heads=3"])
    with pytest.raises(SpecdecError, match="fc_norm"):
        load_recipe("cpu", ["head.fc_norm=true", "head.norm_before_fc=true"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizr: {lr: 1}", "Did you mean optimizer?"),
        ("optimizer: {lrr: 1}", "Did you mean lr?"),
        ("optimizer: 3", "YAML mapping"),
        ("[1]", "YAML mapping"),
        ("a: [", "is not YAML"),
        ("data: {prompts: 2024-99-99}", "is not YAML: month"),
        ("[" * 5000, "is not YAML"),
        ("\udcff", "is not YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SpecdecError) as caught:
        load_recipe(tmp_path / "mine.yaml")
    assert words in str(caught.value)


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(SpecdecError, match="cpu, gpu, large"):
        load_recipe("gpuu")


def test_an_empty_file_is_the_defaults_and_exponents_are_numbers() -> None:
    assert parse_recipe("") == Recipe()
    assert parse_recipe("optimizer: {lr: 1e-4}").optimizer.lr == 1e-4


def test_hash_is_pinned_and_follows_every_value() -> None:
    assert Recipe().hash() == "be52aac8e577f5b5"
    assert Recipe(trainer=TrainerSection(seed=1)).hash() != Recipe().hash()
    other = Recipe(optimizer=OptimizerSection(lr=0.5))
    assert Recipe().differences(other) == ["optimizer.lr: 0.0001 -> 0.5"]


def test_steps_follow_the_curriculum() -> None:
    unroll = UnrollSection(steps=3, curriculum=((0.0, 1), (0.4, 2), (0.7, 3)))
    assert [unroll.steps_at(p) for p in (0.0, 0.39, 0.4, 0.7, 1.0)] == [1, 1, 2, 3, 3]
    assert UnrollSection(steps=5).steps_at(0.0) == 5


@settings(max_examples=15, deadline=None)
@given(
    lr=st.floats(1e-7, 1.0),
    seed=st.integers(0, 2**63 - 1),
    licences=st.lists(st.text(), min_size=1, max_size=3),
)
def test_any_recipe_survives_yaml(lr: float, seed: int, licences: list[str]) -> None:
    data, trainer = DataSection(licences=tuple(licences)), TrainerSection(seed=seed)
    text = Recipe(data=data, optimizer=OptimizerSection(lr=lr), trainer=trainer).to_yaml()
    assert parse_recipe(text).to_yaml() == text
