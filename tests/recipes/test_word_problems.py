import re

import pytest
import torch

from recipes.word_problems import made_up, main, pad


def test_made_up_solutions_are_right_and_the_same_again():
    problems = made_up(60, seed=3)
    assert problems == made_up(60, seed=3)
    assert len({question for question, _ in problems}) > 50
    for question, answer in problems:
        steps = re.findall(r"<<(\d+)([*+])(\d+)=(\d+)>>", answer)
        assert len(steps) == 2
        for left, sign, right, result in steps:
            assert int(result) == (int(left) * int(right) if sign == "*" else int(left) + int(right))
        assert answer.splitlines()[-1] == f"#### {steps[-1][-1]}"
        assert set(re.findall(r"\d+", question)) <= set(re.findall(r"\d+", answer))


def test_only_answers_have_labels():
    batch = pad([([5, 6], [7, 8]), ([5], [9])])
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([4, 2]))


def test_file_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--data", "nowhere.jsonl"])
    assert "there is no file nowhere.jsonl" in capsys.readouterr().err
