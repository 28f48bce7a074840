"""The head a run goes on from: which is taken, which is refused and in what words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_head import tiny_head
from tiny_training import TableTarget

from specdec.errors import SpecdecError
from specdec.head.export import TargetNames, save_raw
from specdec.head.pretrained import FOLDER
from training.earlier import earlier_head, take_over
from training.recipe import Recipe, parse_recipe

INFO = TableTarget().info


def recipe(start: object, *overrides: str) -> Recipe:
    return parse_recipe("", [f"head.start={start}", *overrides])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_raw(tiny_head(), tmp_path / "head", target=TargetNames("tables"), dtype=torch.float32)


@pytest.mark.parametrize("start", ["closed-form", "random"])
def test_a_new_head_goes_on_from_none(start: str) -> None:
    assert earlier_head(recipe(start), INFO) is None


def test_the_head_comes_whole_and_belongs_to_the_target(saved: Path) -> None:
    found, made = earlier_head(recipe(saved, "head.taps=[1, 2, 3]", "head.num_heads=4"), INFO), tiny_head()
    assert found is not None
    assert found.config == replace(made.config, fingerprint=INFO.fingerprint)
    for name, value in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_the_shipped_head_is_found_by_the_name_of_its_target() -> None:
    shipped = replace(INFO, name="smollm2-135m")
    with pytest.raises(SpecdecError, match="a tap lies beyond"):  # found and loaded, for another target
        earlier_head(recipe("shipped"), shipped)
    assert (FOLDER / "smollm2-135m").is_dir()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["head.intermediate_size=8"], "head.intermediate_size"),
        (["head.num_heads=2"], "head.num_heads"),
        (["head.num_key_value_heads=1"], "head.num_key_value_heads"),
        (["head.fc_norm=true"], "head.fc_norm"),
        (["head.norm_output=true"], "head.norm_output"),
        (["head.taps=[1, 2, 4]"], "taps"),
    ],
)
def test_another_shape_than_the_recipes_is_refused(saved: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(SpecdecError, match=words.replace(".", r"\.")):
        earlier_head(recipe(saved, *overrides), INFO)


def test_a_window_cannot_be_trained(tmp_path: Path) -> None:
    windowed = save_raw(tiny_head(window=16), tmp_path / "head", target=TargetNames("tables"))
    with pytest.raises(SpecdecError, match="full attention"):
        earlier_head(recipe(windowed), INFO)


def test_new_words_start_from_the_targets_rows_and_the_others_stay() -> None:
    earlier, rows = tiny_head(), torch.arange(4 * 32, dtype=torch.float32).view(4, 32)
    head, ids = tiny_head(seed=1, draft_vocab=4), torch.tensor([1, 2, 10, 49])  # it knows every second token
    take_over(head, earlier, ids, rows)
    assert head.ids.tolist() == ids.tolist()
    expected = torch.stack([rows[0], earlier.lm_head.weight[1], earlier.lm_head.weight[5], rows[3]])
    assert torch.equal(head.lm_head.weight, expected)
    assert torch.equal(head.qkv.weight, earlier.qkv.weight)


@pytest.mark.parametrize("start", ["shipped", "nowhere"])
def test_what_is_not_there_is_told_with_what_may_be(start: str) -> None:
    with pytest.raises(SpecdecError, match="closed-form"):
        earlier_head(recipe(start), INFO)


def test_a_head_of_another_target_is_refused(saved: Path) -> None:
    with pytest.raises(SpecdecError, match="hidden"):
        earlier_head(recipe(saved), replace(INFO, hidden=64))
