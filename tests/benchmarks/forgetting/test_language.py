import pytest

from benchmarks.forgetting.language import WordProblems


def test_unknown_skill_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="skills='spelling' is unknown: use 'grammar'"):
        WordProblems(skills="spelling")
