import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsemm_vllm.budget.settings import Settings, SettingsError
from sparsemm_vllm.commands.evaluate.errors import EvalError
from sparsemm_vllm.commands.evaluate.points import Point, mask_points, method_points, parse_share
from sparsemm_vllm.commands.evaluate.questions import Choice, hash_questions, load_questions
from sparsemm_vllm.data import DataError
from sparsemm_vllm.data.pictures import EVAL_SEEDS, make_sample
from support.tiny import picture, skewed_profile


def test_methods_by_budget() -> None:
    points = method_points(["sparsemm", "full", "snapkv"], [64, 32], redistribute=True)
    assert [point.name for point in points] == [
        "sparsemm-32",
        "sparsemm-64",
        "sparsemm+redistribute-32",
        "sparsemm+redistribute-64",
        "snapkv-32",  # redistribution changes nothing
        "snapkv-64",
    ]
    with pytest.raises(EvalError, match="snapkv with a budget of 32 stands there twice"):
        method_points(["snapkv", "sparsemm", "snapkv"], [32], redistribute=False)


def test_settings_of_a_point() -> None:
    values = {"window": 16, "rho": 0.1}
    shared = Settings(**values)
    assert Point("snapkv", 64).settings(shared).as_values() == values | {
        "method": "snapkv",
        "budget": 64,
        "redistribute": False,
    }
    masked = Point("full", mask="visual", heads=((1, 2),)).settings(shared)
    assert masked.mask_heads == [[1, 2]]
    assert masked.method == "full"
    with pytest.raises(SettingsError, match=r"budget .16 tokens. must be larger than window"):
        Point("snapkv", 16).settings(shared)
    with pytest.raises(SettingsError, match=r"snapkw.*did you mean 'snapkv'"):
        Point("snapkw", 64).settings(shared)


def test_masks_silence_the_best_heads_or_others() -> None:
    profile = skewed_profile()
    scores = np.array(profile.scores)
    visual, *random = mask_points(profile, 0.1, ["visual", "random"], 3)
    assert len(visual.heads) == 3  # of 32
    best = {tuple(map(int, divmod(i, 8))) for i in np.argsort(-scores, axis=None)[:3]}
    assert set(visual.heads) == best
    assert [point.name for point in random] == [f"random-heads-masked-{i}" for i in range(3)]
    for point in random:
        assert len(set(point.heads)) == 3
        assert not best & set(point.heads)
    assert len({point.heads for point in random}) == 3
    assert random == mask_points(profile, 0.1, ["random"], 3)
    assert len(mask_points(profile, 0.001, ["visual"], 1)[0].heads) == 1


@pytest.mark.parametrize(
    ("share", "masks", "draws", "message"),
    [
        (0.05, ["visible"], 1, "unknown mask 'visible'; known: visual, random"),
        (0.0, ["visual"], 1, "must lie above 0 % and up to 50 %"),
        (0.6, ["visual"], 1, "60%; it must lie above"),
        (0.05, ["random"], 0, "--draws is 0"),
    ],
)
def test_bad_masks(share: float, masks: list[str], draws: int, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        mask_points(skewed_profile(), share, masks, draws)


def test_shares() -> None:
    assert [parse_share(text) for text in ("5%", " 5 %", "0.05")] == [0.05] * 3
    for text in ("five", "5%x", "", "nan", "%"):
        with pytest.raises(EvalError, match="is no share"):
            parse_share(text)


def test_drawn_questions_are_held_out() -> None:
    questions = load_questions(Choice(source="drawn", tasks=["ocr", "qa"], count=2, seed=1000))
    assert {task: len(some) for task, some in questions.items()} == {"ocr": 2, "qa": 2}
    sample = make_sample(EVAL_SEEDS[1001], "query")
    asked = questions["qa"][1]
    assert (asked.question, asked.answer) == (sample.question, sample.answer)
    assert asked.conversation()[0]["content"][1]["text"] == sample.question
    assert hash_questions(questions) == hash_questions(
        load_questions(Choice(source="drawn", tasks=["ocr", "qa"], count=2, seed=1000))
    )
    assert hash_questions(questions) != hash_questions(
        load_questions(Choice(source="drawn", tasks=["ocr"], count=2, seed=1000))
    )


def test_questions_of_a_file(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    rows = [
        {"file_name": "a.png", "question": "first?", "answer": " 1 "},
        {"file_name": "a.png", "question": "all?", "answer": "1 2", "task": "ocr"},
        {"file_name": "a.png", "question": "second?", "answer": 2, "context": "Be brief."},
        {"file_name": "a.png", "question": "third?", "answer": "3"},
    ]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = load_questions(Choice(source=str(file), tasks=["qa", "ocr"], count=2, seed=0))
    assert [one.question for one in questions["qa"]] == ["first?", "second?"]
    assert [one.answer for one in questions["qa"]] == ["1", "2"]
    assert questions["qa"][1].conversation()[0] == {"role": "system", "content": "Be brief."}
    assert [one.question for one in questions["ocr"]] == ["all?"]
    assert isinstance(questions["qa"][0].image, Image.Image)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1: JSONDecodeError"),
        ("[]", "line 1: AttributeError"),
        ('{"question": "?", "answer": "x"}', "line 1: KeyError: 'file_name'"),
        ('{"file_name": "gone.png", "question": "?", "answer": "x"}', "line 1: FileNotFoundError"),
        ('{"file_name": "a.png", "question": "?", "answer": " "}', "line 1: the answer is empty"),
        ('{"file_name": "a.png", "question": "?", "answer": "x", "task": "ocr"}', "no question of"),
    ],
)
def test_bad_files(tmp_path: Path, row: str, message: str) -> None:
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "some.jsonl").write_text(row)
    with pytest.raises(DataError, match=message):
        load_questions(Choice(source=str(tmp_path / "some.jsonl"), tasks=["qa"], count=2, seed=0))


@pytest.mark.parametrize(
    ("source", "tasks", "count", "seed", "message"),
    [
        ("drawn", ["read"], 1, 0, "unknown task 'read'; known: ocr, qa"),
        ("drawn", ["ocr"], 0, 0, "must be at least 1, got 0"),
        ("drawn", ["ocr"], 1, -1, "seed must be 0 to"),
        ("elsewhere", ["ocr", "qa"], 1, 0, "give --tasks ocr"),
    ],
)
def test_bad_questions(source: str, tasks: list[str], count: int, seed: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_questions(Choice(source=source, tasks=tasks, count=count, seed=seed))
