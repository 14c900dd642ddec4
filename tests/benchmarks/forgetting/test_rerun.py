import shutil
from pathlib import Path

from benchmarks.forgetting import rerun
from benchmarks.forgetting.protocol import Protocol
from benchmarks.forgetting.table import read_runs, write_runs

EVIDENCE = Path(rerun.__file__).parent / "evidence"


def test_runs_of_both_files_are_compared_where_they_come_to_the_level(tmp_path, capsys):
    protocol = EVIDENCE / "digits_together.toml"
    one, other = EVIDENCE / "digits_together-runs.csv", tmp_path / "other.csv"
    shutil.copy(one, other)
    rerun.main([str(protocol), str(one), str(other)])
    all_runs = len(read_runs(one))
    assert f"| all | {all_runs} | {all_runs} | 0 |" in capsys.readouterr().out
    # Without the first of them, and with another loss in the second.
    lines = one.read_text().splitlines(keepends=True)
    runs = read_runs(one)
    first = sum(len(run.path) + len(run.line) for run in runs[:1])
    parts = lines[first + 1].split(",")
    parts[lines[0].split(",").index("loss")] = "9.5"
    other.write_text("".join([lines[0], ",".join(parts), *lines[first + 2 :]]))
    assert len(read_runs(other)) == all_runs - 1
    rerun.main([str(protocol), str(one), str(other)])
    assert f"| all | {all_runs - 1} | {all_runs - 2} | 0 |" in capsys.readouterr().out
    write_runs([], Protocol.read(protocol), other)
    rerun.main([str(protocol), str(one), str(other)])
    assert "| all | 0 | 0 | 0 | nan | nan |" in capsys.readouterr().out
