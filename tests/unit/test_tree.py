# SPDX-License-Identifier: AGPL-3.0-or-later
"""The tree of snapshots: its file, ours and the old ash's, and what is done to it."""

import ast
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ash import MISSING, AshError, Tree, tree_from_history

pytestmark = pytest.mark.budget(10)

# A plain model of a tree: the parent of each number, in the order in which they were added.
Model = dict[int, int | None]


@st.composite
def models(draw: st.DrawFn) -> Model:
    """A tree as a plain dictionary."""
    numbers = draw(st.lists(st.integers(0, 10**6), unique=True, max_size=25))
    return {n: draw(st.sampled_from([None, *numbers[:i]])) for i, n in enumerate(numbers)}


def built(model: Model) -> Tree:
    """The model as a Tree."""
    tree = Tree.parse('{"name": "root"}')
    for number, parent in model.items():
        tree.add(number, parent)
    return tree


def below(model: Model, number: int) -> set[int]:
    """A number and all below it, in the model."""
    found = {number}
    while more := {n for n, parent in model.items() if parent in found} - found:
        found |= more
    return found


def as_dict(model: Model, of: int | None, name: object) -> dict[str, Any]:
    """The model in the shape of the tree's file, with names made by a function."""
    children = [as_dict(model, n, n) for n, parent in model.items() if parent == of]
    return {"name": name, **({"children": children} if children else {})}


@given(models())
def test_the_tree_file_is_read_and_written(model: Model) -> None:
    tree = built(model)
    again = Tree.parse(tree.dump())
    assert {n: again.parent(n) for n in again.numbers()} == model
    assert again.dump() == tree.dump()


@given(models())
def test_the_file_is_one_line_that_json_and_python_read_alike(model: Model) -> None:
    text = built(model).dump()
    assert text.count("\n") == 1
    assert json.loads(text) == ast.literal_eval(text) == as_dict(model, None, "root")


@given(models())
def test_the_tree_file_of_ashos_is_read(model: Model) -> None:
    def old(of: int | None, name: str) -> dict[str, Any]:
        children = [old(n, str(n)) for n, parent in model.items() if parent == of]
        return {"name": name, **({"children": children} if children else {})}

    tree = Tree.parse(str(old(None, "root")))
    assert {n: tree.parent(n) for n in tree.numbers()} == model


@given(models(), st.data())
def test_a_branch_is_a_number_with_everything_below_it(model: Model, data: st.DataObject) -> None:
    tree = built(model)
    for number in model:
        branch = tree.branch(number)
        assert branch[0] == number
        assert set(branch) == below(model, number)
    if model:
        removed = data.draw(st.sampled_from(sorted(model)))
        tree.remove(removed)
        assert set(tree.numbers()) == set(model) - below(model, removed)


@given(models())
def test_parents_come_before_their_branches(model: Model) -> None:
    numbers = built(model).numbers()
    assert all(parent is None or numbers.index(parent) < numbers.index(n) for n, parent in model.items())


@settings(max_examples=40)
@given(models(), st.booleans())
def test_each_snapshot_is_drawn_on_a_line_of_its_own(model: Model, ascii_only: bool) -> None:
    drawn = built(model).draw(lambda n: f"<{n}>", ascii_only)
    lines = drawn.splitlines()
    assert lines[0] == "root - root"
    assert sorted(int(line.partition("<")[2].rstrip(">")) for line in lines[1:]) == sorted(model)
    assert not ascii_only or drawn.isascii()


@given(models(), st.integers(0, 10**6))
def test_a_missing_snapshot_is_reported(model: Model, number: int) -> None:
    tree = built(model)
    assert (number in tree) == (number in model)
    if number not in model:
        for ask in (tree.branch, tree.parent, tree.remove):
            with pytest.raises(AshError) as caught:
                ask(number)
            assert caught.value.status == MISSING


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        '{"name": "toor"}',
        '{"name": "root", "children": [{"name": "x"}]}',
        '{"name": "root", "children": [{"name": 1}, {"name": 1}]}',
        '{"name": "root", "children": [{"name": 1, "children": [{"name": "1"}]}]}',
        '{"name": "root", "children": [{"name": -1}]}',
        '{"name": "root", "children": [{"children": []}]}',
        '{"name": "root", "children": 5}',
        '{"children": []}',
        "__import__('os').abort()",
        "{'name': 'root', 'children': [" * 4000,
    ],
)
def test_a_damaged_file_is_an_error_of_one_line(text: str) -> None:
    with pytest.raises(AshError) as caught:
        Tree.parse(text)
    assert "\n" not in caught.value.message


@given(st.text(max_size=60))
def test_any_text_is_a_tree_or_an_error(text: str) -> None:
    with contextlib.suppress(AshError):
        assert Tree.parse(text).dump()


def test_a_new_system_has_only_the_base() -> None:
    tree = Tree()
    tree.add(0)
    assert tree.dump() == '{"name": "root", "children": [{"name": 0}]}\n'


def test_children_of_a_removed_snapshot_move_up() -> None:
    tree = Tree.parse(
        '{"name": "root", "children": [{"name": 1, "children": [{"name": 2, "children": [{"name": 3}, {"name": 4}]}]}]}'
    )
    tree.take_out(2)
    assert {n: tree.parent(n) for n in tree.numbers()} == {1: None, 3: 1, 4: 1}
    tree.take_out(1)
    assert {n: tree.parent(n) for n in tree.numbers()} == {3: None, 4: None}


def made(number: int, original: int, parent: object, **more: object) -> dict[str, Any]:
    """A line of the history."""
    return {"result": "done", "snapshot": number, "from": original, "parent": parent, **more}


def test_the_tree_can_be_rebuilt_from_the_history() -> None:
    history: list[dict[str, Any]] = [
        made(1, 0, None),
        made(2, 1, 1),
        made(3, 2, 2),
        {"result": "done", "snapshots": [2]},
        made(4, 1, None, copies={"1": 4, "3": 5}),  # 2 was taken out, and 3 moved up
        {**made(6, 0, 1), "result": "failed"},
    ]
    tree = tree_from_history([0, 1, 3, 4, 5, 6, 7], history)
    assert {n: tree.parent(n) for n in tree.numbers()} == {0: None, 1: None, 3: 1, 4: None, 5: 4, 6: None, 7: None}


def test_a_damaged_history_makes_no_wrong_tree() -> None:
    odd: list[dict[str, Any]] = [
        made(1, 0, 1),
        made(1, 0, 2),
        made(2, 0, 1),
        made(2, 0, "x"),
        made(3, 0, None, copies={"x": "y"}),
        {"from": 1},
    ]
    odd += [{"result": "done", "from": 1}, {"result": "done", "from": 0, "copies": 5}]
    tree = tree_from_history([1, 2, 3], odd)
    assert {n: tree.parent(n) for n in tree.numbers()} == {1: None, 2: 1, 3: None}
