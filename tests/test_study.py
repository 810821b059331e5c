"""The studies' tables say what their curves say, and the studies run what they name."""
import math

import numpy as np
import pytest

import haste_train
import run
import xar_train
from experiments import clutter, digits, scenes, study, xar_haste


def test_steps_to_a_level():
    steps, values = np.array([100, 200, 300]), np.array([4.0, 2.0, 3.0])
    assert study.steps_to(steps, values, 5) == 100                          # there from the start
    assert study.steps_to(steps, values, 3) == 150                          # half-way between two evaluations
    assert study.steps_to(steps, values, 2) == 200
    assert math.isnan(study.steps_to(steps, values, 1))


def curves(*accuracies):
    return [{"step": np.array([100, 200]), "accuracy": np.array(values)} for values in accuracies]


def test_tables(capsys):
    both = {"plain": curves((0.1, 0.2), (0.2, 0.4)), "faster": curves((0.3, 0.5), (0.3, 0.6))}
    scores = {"accuracy": ("accuracy %", 1, 100)}
    study.print_last(both, scores)
    study.print_over_steps(both, (100, 200), scores)
    study.print_steps_to_levels(both, "accuracy", "accuracy", -1, (100, 200))
    lines = capsys.readouterr().out.splitlines()
    assert "| plain | 30.0 ± 14.1 |" in lines and "| faster | 55.0 ± 7.1 |" in lines
    assert "| plain | 15.0 | 30.0 |" in lines and "| faster | 30.0 | 55.0 |" in lines
    # levels of the same seed: 0.2 is there at the first evaluation, 0.4 a third of the way later
    assert "| plain | 100 ± 0 (1.00) | 200 ± 0 (1.00) |" in lines
    assert "| faster | 100 ± 0 (1.00) | 117 ± 24 (0.58) |" in lines


def test_a_level_that_is_not_reached_is_said(capsys):
    both = {"plain": curves((0.1, 0.4), (0.2, 0.4)), "slower": curves((0.1, 0.3), (0.1, 0.4))}
    study.print_steps_to_levels(both, "accuracy", "accuracy", -1, (200,))
    assert "| slower | 1 of 2 seeds |" in capsys.readouterr().out


@pytest.mark.parametrize("program, groups", [
    (haste_train, digits.GROUPS), (haste_train, clutter.GROUPS), (xar_train, xar_haste.GROUPS),
    (haste_train, {"methods": scenes.METHODS, "start": scenes.START})], ids=["digits", "clutter", "xar", "scenes"])
def test_every_method_of_a_study_is_a_command(program, groups):
    for methods in groups.values():
        for flags in methods.values():
            cfg = run.parse(program.Config, flags, program.PROGRAM, "", program.PRESETS)
            program.check(cfg, 1)


def test_a_finished_run_is_only_read(tmp_path, monkeypatch):
    folder = study.folder_of("HASTE, until half", 1, tmp_path)
    assert folder == tmp_path / "haste_until_half_1"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "fd": 3.0}\n')
    monkeypatch.setattr(study.subprocess, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    found = study.train("HASTE, until half", [], 1, 1, tmp_path, 2, ("step", "fd", "fid"))
    assert found["step"] == [2] and found["fd"] == [3] and np.isnan(found["fid"]).all()


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--jobs", "0"], ["nothing"]])
def test_nonsense_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        study.arguments("", "out", ("a", "b"), argv)
    assert "usage" in capsys.readouterr().err
