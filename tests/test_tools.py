"""The tools run from the root: their help, and what their tables claim to compare."""
import subprocess
import sys

import pytest
from conftest import ROOT

from tools import bench


def tool(*words):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_help_lists_every_command_and_flag():
    assert "--patches" in tool("tools.look", "--help")
    text = tool("tools.bench", "--help")
    assert all(f"python -m tools.bench {command}" in text for command in bench.COMMANDS)


@pytest.mark.parametrize("command, flag", [("sample", "--entity"), ("fid", "--image-size"), ("loader", "--count"),
                                           ("train", "--preset")])
def test_help_of_each_benchmark(command, flag, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main([command, "--help"])
    assert e.value.code == 0 and flag in capsys.readouterr().out


def test_bench_compares_samplers_that_draw_the_same(capsys):
    flags = ["--hidden-size", "16", "--depth", "2", "--num-heads", "2", "--repeats", "1", "--device", "cpu"]
    bench.main(["sample", *flags, "--grid", "4", "--entity", "cell:2", "--steps", "4", "--sit-steps", "25"])
    text = capsys.readouterr().out
    assert float(text.split("differ by ")[1].split(" of")[0]) < 1e-5
    rows = [line.split("|") for line in text.splitlines() if line.startswith(("| xAR", "| SiT"))]
    counts = {row[1].strip(): int(row[4].replace(",", "")) for row in rows}
    cached = 4 * 4 * (1 + 3 * 2) + 3 * 4 * 2                                # entity 0 is not guided
    assert counts == {"xAR, cached": cached, "xAR, prefix recomputed": 4 * 4 * (1 + 2 * (2 + 3 + 4)),
                      "SiT": 25 * 16 * 2}
    for argv, message in ((["sampel"], "python -m tools.bench sample"), ([], "python -m tools.bench sample"),
                          (["sample", "--steps", "0"], "--steps 0 must be 1")):
        with pytest.raises(SystemExit, match=message) as e:
            bench.main(argv)
        assert "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize("command, found", [
    (["loader", "--count", "600", "--size", "32"], "samples/s"),
    (["train", "--device", "cpu", "--steps", "4", "--count", "10", "--model", "SiT-Ti/8", "--batch-size", "2",
      "--log-every", "1"], "waited for data"),
], ids=["loader", "train"])
def test_benchmarks_of_packed_data_run(command, found, tmp_path):
    assert found in tool("tools.bench", *command, "--out", str(tmp_path / "bench"))
    assert not list((tmp_path / "bench").iterdir())                         # set and run are deleted
