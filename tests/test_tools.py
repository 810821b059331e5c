"""The tools run from the root: their help, and that what their tables compare computes the same."""
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import flop_registry

import haste_train
import run
import teacher
import xar_train
from tools import bench, measure, memory, straightforward, training

CPU = torch.device("cpu")


def tool(*words):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_tools_look_lists_its_flags():
    assert "--patches" in tool("tools.look", "--help")


def test_help_lists_every_command(capsys):
    bench.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"python -m tools.bench {command}" in text for command in bench.COMMANDS)


@pytest.mark.parametrize("command, flag", [("sample", "--entity"), ("fid", "--image-size"), ("loader", "--count"),
                                           ("program", "--preset"), ("train", "--profile"), ("growth", "--out"),
                                           ("memory", "--help")])
def test_help_of_each_benchmark(command, flag, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main([command, "--help"])
    assert e.value.code == 0 and flag in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [
    (["sampel"], "python -m tools.bench sample"), ([], "python -m tools.bench sample"),
    (["sample", "--steps", "0"], "--steps 0 must be 1"), (["growth", "--repeats", "0"], "--repeats 0 must be 1"),
    (["train", "--batch-size", "3", "--accumulate", "2"], "multiple of --accumulate 2"),
    (["train", "--size", "33"], "--size 33 must be a multiple of patch 2"),
    (["train", "--preset", "imagenet256-b", "--model", "xAR-B"], "is no model of --preset imagenet256-b"),
    (["train", "--profil"], "did you mean --profile"),
])
def test_nonsense_ends_with_one_line(argv, message):
    with pytest.raises(SystemExit, match=message) as e:
        bench.main(argv)
    assert "\n" not in str(e.value)


# ---- contenders

@pytest.fixture(scope="module", params=["digits", "scenes"])
def haste_steps(request):
    """HASTE's contenders on a tiny SiT or MM-DiT, with a teacher of fewer heads."""
    torch.manual_seed(0)
    net = teacher.DINOv2(embed_dim=24, depth=3, num_heads=2).resize_pos_embed(4).requires_grad_(False).eval()
    cfg = training.config(request.param, hidden_size=32, depth=4, num_heads=4, projector_dim=16)
    haste_train.check(cfg, 1)
    channels, size, pixels = training.geometry(cfg)
    args = SimpleNamespace(size=size, channels=channels, pixels=pixels, batch_size=4, accumulate=2)
    return training.haste_steps(args, cfg, net, CPU, run.autocast("fp32", CPU))


def gradients(step):
    step.gradients()
    found = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
    step.model.zero_grad()
    return found


def same(a, b):
    """The largest difference of two sets of gradients, relative to each one's largest entry."""
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max() / (b[k].abs().max() + 1e-12) for k in b)


def test_training_steps_compute_the_same(haste_steps):
    before, their_before, after, their_after, plain = (gradients(step) for step in haste_steps.values())
    assert same(before, their_before) < 1e-4 and any("projectors" in name for name in before)
    assert same(after, plain) == 0 and same(their_after, plain) < 1e-6
    assert same({k: before[k] for k in plain}, plain) > 1e-2                # the alignment is in it
    first, second = list(haste_steps.values())[:2]
    assert training.gradient_difference(first, second) < 1e-5
    weight = first.model.x_embedder.proj.weight
    for step in haste_steps.values():                                       # all train one set of weights
        old = weight.clone()
        step()
        assert not torch.equal(weight, old) and step.model.x_embedder.proj.weight is weight


@pytest.mark.parametrize("entity", ["cell:2", "scale"])
def test_xar_steps_compute_the_same(entity):
    cfg = xar_train.Config(depth=4, hidden_size=16, num_heads=2, entity=entity)
    args = SimpleNamespace(size=4, channels=2, batch_size=3, accumulate=1)
    ours, theirs = training.xar_steps(args, cfg, CPU, run.autocast("fp32", CPU)).values()
    rows = slice(0, 3)
    assert ours.loss(rows).item() == pytest.approx(theirs.loss(rows).item(), rel=1e-6)
    assert same(gradients(ours), gradients(theirs)) < 1e-4
    ours()
    theirs()


def test_bench_compares_samplers_that_draw_the_same(capsys):
    flags = ["--hidden-size", "16", "--depth", "2", "--num-heads", "2", "--repeats", "1", "--device", "cpu"]
    bench.main(["sample", *flags, "--grid", "4", "--entity", "cell:2", "--steps", "4", "--sit-steps", "25"])
    text = capsys.readouterr().out
    differences = [float(line.split("differ by ")[1].split(" of")[0]) for line in text.splitlines()[:2]]
    assert max(differences) < 1e-5
    rows = [line.split("|") for line in text.splitlines() if line.startswith(("| xAR", "| SiT"))]
    counts = {row[1].strip(): int(row[4].replace(",", "")) for row in rows}
    cached = 4 * 4 * (1 + 3 * 2) + 3 * 4 * 2                                # entity 0 is not guided
    assert counts == {"xAR, cached": cached, "xAR, straightforward cache": 4 * 4 * 2 * (4 + 1),
                      "xAR, prefix recomputed": 4 * 4 * (1 + 2 * (2 + 3 + 4)), "SiT": 25 * 16 * 2}


def test_a_step_that_does_not_fit_is_named_and_left_out(monkeypatch, capsys):
    real = straightforward.xar_loss

    def too_large(model, x, *args):
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return real(model, x, *args)
    monkeypatch.setattr(straightforward, "xar_loss", too_large)
    bench.main(["train", "--model", "xAR-Ti", "--size", "8", "--channels", "1", "--repeats", "1", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "xAR, straightforward does not fit" in text and "| xAR, ours |" in text and "| xAR, straight" not in text


def test_loader_is_measured(tmp_path, capsys):
    bench.main(["loader", "--count", "40", "--size", "16", "--batch-size", "8", "--repeats", "1", "--out", str(tmp_path)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| packed.py", "| mapped"))]
    assert len(rows) == 4 and not list(tmp_path.iterdir())                  # the set is deleted


# ---- what is measured

def test_measures_of_a_known_call():
    a = torch.randn(300, 300)

    def call():
        b = a @ a                                                           # one product, 27 M multiplications
        c = b + 1                                                           # reads one matrix, writes one
        del b
        return c * 2

    assert measure.arithmetic(call) == {"matrix": 2 * 300 ** 3, "attention": 0}
    assert measure.traffic(call) == 4 * 4 * 300 ** 2
    assert 2 * 4 * 300 ** 2 <= measure.peak_bytes(call, CPU) < 2.2 * 4 * 300 ** 2
    parts = measure.time_by_kind(call, CPU)
    assert parts["matrix"] > 0 and parts["elementwise"] > 0 and min(parts.values()) >= 0
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
        return                                                              # an older torch's counter does not know it
    q = torch.randn(1, 2, 8, 4)
    attention = measure.arithmetic(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention == {"matrix": 0, "attention": 4 * 2 * 8 * 8 * 4}


def test_alignment_does_not_grow_with_the_square():
    autocast = run.autocast("fp32", CPU)
    few, difference = memory.measure_growth(64, 1, 1, CPU, autocast)
    many, _ = memory.measure_growth(256, 1, 1, CPU, autocast)
    assert difference < 1e-5

    def growth(name):
        return many[name][1] / few[name][1]
    assert growth("ours") < 5 and growth("straightforward") > 6
    assert many["ours"][1] < many["straightforward"][1]


@pytest.mark.slow
def test_memory_of_presets():
    xl = training.config("imagenet256-xl")
    haste_train.check(xl, 1)
    block = 256 * (memory.haste_activations(xl, 2) - memory.haste_activations(xl, 1)) / 1e9
    assert block == pytest.approx(3.63, rel=0.1)                            # 48 bytes a token and channel
    xar = training.config("xar-imagenet256-h")
    block = memory.xar_activations(xar, 3) - memory.xar_activations(xar, 2)
    assert block / 256 / 1280 == pytest.approx(66, rel=0.1)                 # of xAR 66
    coco = training.config("coco256")
    haste_train.check(coco, 1)
    block = memory.haste_activations(coco, 3) - memory.haste_activations(coco, 2)
    assert block / (256 + 77) / 768 == pytest.approx(48, rel=0.1)           # of MM-DiT 48, for image and text

    images, activations, state = memory.preset_parts("imagenet256-xl", accumulate=2)
    assert images == 16 and 28 * 3.3 / 16 < activations < 28 * 4.2 / 16 and 14 < state < 17
    _, _, state = memory.preset_parts("coco256")
    assert state == pytest.approx(22 * 0.5124 + 4 * (0.0866 + 0.12306), rel=0.01)          # 512 M; teacher, text tower
    assert memory.preset_memory("cifar10") < 0.9 * 24                       # GB of the smallest card


# ---- whole commands

@pytest.mark.slow
@pytest.mark.parametrize("command, found", [
    (["loader", "--count", "600", "--size", "32"], "samples/s"),
    (["program", "--device", "cpu", "--steps", "4", "--count", "10", "--model", "SiT-Ti/8", "--batch-size", "2",
      "--log-every", "1"], "waited for data"),
], ids=["loader", "program"])
def test_benchmarks_of_packed_data_run(command, found, tmp_path):
    assert found in tool("tools.bench", *command, "--out", str(tmp_path / "bench"))
    assert not list((tmp_path / "bench").iterdir())                         # set and run are deleted


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--preset", "digits", "--teacher", "vits14", "--profile"],
                                   ["--model", "MMDiT-Ti/4", "--teacher", "vits14"],
                                   ["--model", "xAR-Ti", "--accumulate", "2"]], ids=["haste", "captions", "xar"])
def test_benchmark_of_training_runs(flags):
    text = tool("tools.bench", "train", "--device", "cpu", "--repeats", "1", *flags)
    assert "of the time" in text and "straightforward" in text
    assert ("matrix products" in text) == ("--profile" in flags)


@pytest.mark.slow
def test_benchmark_of_growth_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "TOKENS", (64, 128, 256))
    bench.main(["growth", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "growth.png")])
    assert 0 < (tmp_path / "growth.png").stat().st_size < 60_000 and "| 256 |" in capsys.readouterr().out


@pytest.mark.slow
def test_every_preset_fits_the_cards_that_the_readme_names(capsys):
    """Eight of 80 GB for ImageNet, one of 24 GB for CIFAR-10, and a tenth of each is left for temporary tensors."""
    bench.main(["memory"])
    text = capsys.readouterr().out
    assert all(line in (ROOT / "docs" / "speed.md").read_text() for line in text.splitlines())
    rows = re.findall(r"^\| `([\w-]+)` \| (\d) .*\| ([\d.]+) \|$", text, re.M)
    assert {name for name, _, _ in rows} == training.presets().keys() - set(memory.FOR_LAPTOPS)
    too_large = [(name, need) for name, gpus, need in rows if float(need) > 0.9 * {"8": 80, "1": 24}[gpus]]
    assert not too_large
    assert memory.preset_memory("xar-imagenet256-h", accumulate=1) > 0.9 * 80       # it would not without --accumulate
