"""The tour: ten stops of one shape on its page, quotes that stand in the code, and the command that draws the pictures."""
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

PAGE = ROOT / "docs" / "tour.md"
PICTURES = sorted((ROOT / "docs" / "tour").glob("*.png"))
STOPS = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
QUOTE = re.compile(r"\[`[\w.]+`\]\(\.\./(\w+\.py)#L(\d+)\):?\n\n```py\n(.*?)```", re.S)


def test_ten_pictures():
    named = re.findall(r"!\[[^\]]+\]\((tour/[\w.]+)\)", PAGE.read_text())
    assert named == [f"tour/{path.name}" for path in PICTURES] and len(named) == len(STOPS) == 10
    assert "](docs/tour.md)" in (ROOT / "README.md").read_text()


def test_pictures_are_light_and_not_empty():
    for path in PICTURES:
        assert 3_000 < path.stat().st_size < 120_000, path
        assert np.asarray(Image.open(path).convert("L")).std() > 10, path
    assert sum(path.stat().st_size for path in PICTURES) < 800_000


@pytest.mark.parametrize("stop", STOPS, ids=[stop.splitlines()[0] for stop in STOPS])
def test_a_stop_has_one_picture_three_sentences_and_its_lines(stop):
    number = STOPS.index(stop) + 1
    assert stop.startswith(f"{number}. ") and len(re.findall(rf"!\[[^\]]+\]\(tour/{number:02d}_", stop)) == 1
    prose = [part for part in re.sub(r"```.*?```", "", stop, flags=re.S).split("\n\n")[1:]
             if not part.lstrip().startswith(("![", "[`"))]
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z])", " ".join(prose).strip())
    assert len(sentences) == 3, sentences

    quotes = QUOTE.findall(stop)
    assert quotes and len(quotes) == stop.count("```py")
    for file, start, code in quotes:
        lines = [line.split("  #")[0].strip() for line in (ROOT / file).read_text().splitlines()[int(start):]]
        for line in code.strip().splitlines():
            assert line.strip() in lines, f"{file} has no line {line.strip()!r} after {start}"
            lines = lines[lines.index(line.strip()) + 1:]


@pytest.mark.slow
def test_the_command_draws_every_picture(tmp_path):
    command = [sys.executable, "-m", "experiments.tour", "--out", str(tmp_path), "--steps", "10", "--xar-steps", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    drawn = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in drawn] == [path.name for path in PICTURES]
    assert min(np.asarray(Image.open(path).convert("L")).std() for path in drawn) > 5
