"""Many processes, killed processes, compiled processes: `python -m pytest -m slow`."""
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import GUIDED_XAR, ROOT, TINY, TINY_XAR, photographs, rows_of, same_weights
from PIL import Image
from processes import (ENV, checkpoint, finish, free_port, kill, kill_all, start, steps_in,
                       torchrun, wait_for_step, wait_until, workers_of)

import haste_train
import run
import sit

pytestmark = pytest.mark.slow
HASTE = ["haste_train.py", *TINY, "--eval-every", "0"]
XAR = ["xar_train.py", *TINY_XAR, "--eval-every", "0"]


def start_training(processes, *flags, out, teacher=None, program=HASTE, launch=None, env=()):
    """Start a training program, its output in OUT.txt. `launch` replaces the usual torchrun."""
    launch = torchrun(processes) if launch is None else launch
    words = [*launch, *program, "--out", out, *flags]
    if teacher:
        words += ["--teacher-weights", teacher]
    return start(words, f"{out}.txt", env)


def train(processes, *flags, **kwargs):
    """Train to the end; return all output."""
    return finish(start_training(processes, *flags, **kwargs))


def three_ways(tmp_path, *flags, **kwargs):
    """Train on one process, on two, and on two with accumulation; return the rows of their logs."""
    train(1, *flags, out=tmp_path / "one", **kwargs)
    train(2, *flags, out=tmp_path / "two", **kwargs)
    train(2, *flags, "--accumulate", "2", out=tmp_path / "parts", **kwargs)
    return [rows_of(tmp_path / name) for name in ("one", "two", "parts")]


def assert_close(logs, steps, key="loss", tolerance=1e-5):
    """Assert that all logs agree with the first one in a number of every step that has it."""
    for rows in logs:
        assert [r["step"] for r in rows] == list(range(1, steps + 1))
        for a, b in zip(logs[0], rows):
            assert (key in a) == (key in b)
            if key in a:
                assert abs(a[key] - b[key]) < tolerance * max(1, abs(a[key])), (a["step"], key)


def assert_same_run(a, b):
    """Assert that two runs have ended bit for bit alike."""
    assert same_weights(checkpoint(a), checkpoint(b))
    assert rows_of(a) == rows_of(b)


@pytest.mark.parametrize("flags", [["--mirror"], ["--data", "scenes", "--model", "MMDiT-Ti/4"],
                                   ["--data", "clutter", "--model", "SiT-Ti/4"]], ids=["digits", "scenes", "clutter"])
def test_two_processes_are_one(tmp_path, small_teacher, flags):
    """One process, two, and two with accumulation: the same curves, across the end of guidance."""
    # a larger learning rate amplifies rounding
    logs = three_ways(tmp_path, *flags, "--steps", "20", "--stop", "10", "--contrastive", "0.05", "--lr", "0.002",
                      teacher=small_teacher)
    for key in ("loss", "feature_loss", "attention_loss", "contrastive_term"):
        assert_close(logs, 20, key)
    assert_close(logs, 20, "grad_norm", tolerance=1e-4)
    for rows in logs:
        assert [r["step"] for r in rows if "feature_loss" in r] == list(range(1, 11))
        assert [r.keys() for r in rows] == [r.keys() for r in logs[0]]


def test_resume_on_two_processes_is_bit_for_bit(tmp_path, small_teacher):
    flags = ["--resume", "auto", "--stop", "4"]
    train(2, *flags, "--steps", "8", out=tmp_path / "straight", teacher=small_teacher)
    for steps in ("3", "6", "8"):
        train(2, *flags, "--steps", steps, out=tmp_path / "parts", teacher=small_teacher)
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    # on another number of processes
    text = train(1, *flags, "--steps", "9", out=tmp_path / "parts", teacher=small_teacher)
    assert "resuming from step 8" in text and checkpoint(tmp_path / "parts")["steps"] == 9


@pytest.mark.parametrize("processes, whom", [(1, "all"), (2, "one"), (2, "all")])
def test_sigterm_saves_and_exits_with_0(tmp_path, small_teacher, processes, whom):
    """A signal to any process ends all after the same step; the same command resumes exactly."""
    flags = ["--resume", "auto", "--stop", "20"]
    process = start_training(processes, *flags, "--steps", "4000", out=tmp_path / "run",
                             teacher=small_teacher)
    wait_for_step(process, tmp_path / "run", 10)
    targets = [process.pid] if processes == 1 else workers_of(process)
    assert len(targets) == processes
    for pid in targets if whom == "all" else targets[-1:]:
        os.kill(pid, signal.SIGTERM)
    text = finish(process)
    done = checkpoint(tmp_path / "run")["steps"]
    assert 10 <= done < 4000 and f"stopped by a signal after step {done}" in text
    for name in ("run", "straight"):
        train(processes, *flags, "--steps", done + 5, out=tmp_path / name,
              teacher=small_teacher)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_sigterm_to_torchrun_itself_loses_nothing(tmp_path, small_teacher):
    flags = ["--resume", "auto", "--steps", "4000"]
    process = start_training(2, *flags, out=tmp_path / "run", teacher=small_teacher)
    wait_for_step(process, tmp_path / "run", 5)
    process.terminate()
    text = finish(process, code=1)                                          # its workers get the signal; it says 1
    assert checkpoint(tmp_path / "run")["steps"] >= 5 and "stopped by a signal" in text


def test_kill_at_random_moments_leaves_a_loadable_checkpoint(tmp_path, small_teacher):
    """kill -9 while every step writes a checkpoint: it resumes to the undisturbed weights."""
    rng = random.Random(0)
    flags = ["--resume", "auto", "--stop", "30"]
    done = 0
    for _ in range(5):
        process = start_training(1, *flags, "--save-every", "1", "--steps", "4000",
                                 out=tmp_path / "run", teacher=small_teacher)
        wait_for_step(process, tmp_path / "run", done + 3)
        time.sleep(rng.random() / 2)
        kill_all(process)
        done = checkpoint(tmp_path / "run")["steps"]                        # readable, whatever was going on
    for name, save_every in (("run", "1"), ("straight", "0")):
        train(1, *flags, "--save-every", save_every, "--steps", done + 3, out=tmp_path / name,
              teacher=small_teacher)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_worker_that_dies_is_restarted(tmp_path, small_teacher):
    flags = ["--resume", "auto", "--save-every", "5", "--steps", "60", "--stop", "30"]
    process = start_training(2, *flags, out=tmp_path / "run", teacher=small_teacher,
                             launch=torchrun(2, "--max-restarts=2"))
    wait_for_step(process, tmp_path / "run", 12)
    kill(workers_of(process)[0])
    assert "resuming from step" in finish(process)
    train(2, *flags, out=tmp_path / "straight", teacher=small_teacher)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("flags, message", [
    (["--batch-size", "9"], "--batch-size 9 must be a multiple of 2 (processes x --accumulate)"),
    (["--data", "nowhere"], "--data nowhere is not a folder"),
    (["--teacher-weights", "nowhere.pt"], "nowhere.pt do not exist"),
    (["--teacher", "dino"], "--teacher dino is neither small nor"),
    (["--eval-every", "1", "--eval-features", "inception", "--eval-weights", "nowhere.pt"], "--eval-weights nowhere.pt is"),
])
def test_errors_of_many_processes_are_one_line(tmp_path, flags, message):
    text = finish(start_training(2, *flags, out=tmp_path / "run"), code=1)
    assert message in text and text.count("haste_train.py: ") == 2
    assert "haste_train.py\", line" not in text                             # no traceback


@pytest.mark.parametrize("processes", [1, 2])
def test_precision_and_compile(tmp_path, small_teacher, processes):
    """Ten steps across the end of guidance: bf16 and compiled runs stay within 2 % of fp32.

    Blocks are compiled twice, with taps and without, in the first step, and never again: nothing
    recompiles when the guidance ends. The learning rate is moderate: TINY's, twenty times higher,
    amplifies any rounding until it shows in the loss.
    """
    flags = ["--steps", "10", "--stop", "5", "--lr", "1e-3"]
    flags += ["--batch-size", 8 * processes]                                # two find what one has compiled
    train(processes, *flags, "--precision", "fp32", out=tmp_path / "fp32", teacher=small_teacher)
    reference = rows_of(tmp_path / "fp32")
    for name, extra in (("bf16", ["--precision", "bf16"]), ("compiled", ["--compile"]),
                        ("both", ["--precision", "bf16", "--compile"])):
        text = train(processes, *flags, *extra, out=tmp_path / name, teacher=small_teacher,
                     env={"TORCH_LOGS": "recompiles"})
        for a, b in zip(reference, rows_of(tmp_path / name)):
            assert abs(a["loss"] / b["loss"] - 1) < 0.02, (name, a["step"])
        expected = processes if "--compile" in extra else 0
        assert len(re.findall("Recompiling function", text)) == expected, text
        assert all(w.dtype == torch.float32 for w in checkpoint(tmp_path / name)["model"].values())


def test_automatic_stop_of_a_compiled_run_is_that_of_an_eager_one(tmp_path, small_teacher):
    flags = ["--stop", "auto", "--stop-warmup", "1", "--stop-interval", "2", "--steps", "4", "--lr", "1e-3"]
    for name, extra in (("eager", []), ("compiled", ["--compile"])):
        train(1, *flags, *extra, out=tmp_path / name, teacher=small_teacher)
    angles = [[r["grad_cosine"] for r in rows_of(tmp_path / name) if "grad_cosine" in r] for name in ("eager", "compiled")]
    assert len(angles[0]) == 1 and angles[1] == pytest.approx(angles[0], abs=0.01)


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_blocks_compile_under_ddp_with_several_buckets(one_process_group, monkeypatch):
    """Two graphs serve all blocks, DDP's buckets cut none of them, and their gradients are those of eager blocks."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend=backend))
    torch.manual_seed(0)
    model = sit.SiT(8, 2, 4, 192, 5, 3, 10, z_dim=16, projector_dim=32, encoder_depth=4)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    x, y, t, eps = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.rand(2), torch.randn(2, 4, 8, 8)
    pairs, cfg = [(1, 0), (3, 1)], haste_train.Config()
    targets = torch.randn(2, 16, 16), [tuple(torch.randn(2, 2, 3, 16, 64)) for _ in pairs]

    def gradients(net, targets):
        model.zero_grad()
        haste_train.losses(net, x, y, t, eps, targets, pairs, cfg)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]
    eager = gradients(model, targets), gradients(model, None)
    run.compile_blocks(model.blocks)
    net = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1, gradient_as_bucket_view=True)
    sizes = []

    def exchange(_, bucket):
        sizes.append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done
    net.register_comm_hook(None, exchange)
    gradients(net, targets)                                                 # DDP forms its buckets in the first step
    sizes.clear()
    found = gradients(net, targets)
    assert len(sizes) >= 5
    assert len(graphs) == 2
    model.projectors = None                                                 # the alignment ends
    net = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1, gradient_as_bucket_view=True)
    for a, b in ((found, eager[0]), (gradients(net, None), eager[1])):
        assert len(a) == len(b) and all((p - q).norm() <= 1e-5 * q.norm() for p, q in zip(a, b))
    assert len(graphs) == 2


# ---- processes that differ

BY_RANK = """
import os, runpy, sys
sys.argv = [word.replace("RANK", os.environ["RANK"]) for word in sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def differing(tmp_path, program, *flags, teacher=None):
    """Run two processes that read RANK in the flags as their rank, and must fail; return what they print."""
    script = tmp_path / "by_rank.py"
    script.write_text(BY_RANK)
    words = [*torchrun(2), script, *program, *flags]
    if teacher:
        words += ["--teacher-weights", teacher]
    text = finish(start(words, tmp_path / "log.txt", {"PYTHONPATH": str(ROOT)}), code=1)
    assert f'{program[0]}", line' not in text                               # no traceback of ours
    return text


def files_below(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", [HASTE, XAR], ids=["haste", "xar"])
@pytest.mark.parametrize("case", ["none", "older", "other flags", "cut short"])
def test_processes_that_find_different_checkpoints_take_no_step(kind, case, tmp_path, small_teacher):
    """The second process finds no checkpoint, an older one, or another run's. Nothing is written, and a line says who."""
    teacher = small_teacher if kind is HASTE else None
    train(1, "--steps", 4, out=tmp_path / "run 0", teacher=teacher, program=kind)
    others = {"older": ["--steps", 2], "other flags": ["--steps", 4, "--lr", "0.001"], "cut short": ["--steps", 4]}
    if case != "none":
        train(1, *others[case], out=tmp_path / "run 1", teacher=teacher, program=kind)
    if case == "cut short":
        ckpt = tmp_path / "run 1" / "ckpt.pt"
        ckpt.write_bytes(ckpt.read_bytes()[:5000])
    before = files_below(tmp_path)
    text = differing(tmp_path, kind, "--steps", 8, "--resume", "auto", "--out", tmp_path / "run RANK", teacher=teacher)
    host = rf"\(host {re.escape(socket.gethostname())}\)"
    has = {"none": "has no checkpoint", "older": "has a checkpoint of step 2", "other flags": "has a checkpoint of step 4"}
    if case == "cut short":
        line = rf"rank 1 {host}: .*run 1/ckpt.pt cannot be read .*; not all processes have this problem"
    else:
        line = rf"rank 1 {host} {has[case]}.*, but rank 0 {host} has a checkpoint of step 4"
    assert re.search(rf"{kind[0]}: {line}.*: .*--out .* on a disk that all machines see", text)
    after = files_below(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} <= {"by_rank.py", "log.txt"}


def test_processes_with_different_flags_or_data_take_no_step(tmp_path, small_teacher, packed_folder):
    text = differing(tmp_path, HASTE, "--seed", "RANK", "--out", tmp_path / "run", teacher=small_teacher)
    assert "has --seed 1, but rank 0" in text and not (tmp_path / "run").exists()
    # two copies of packed data, at the place that each machine calls DATA, of which one is not like the other
    for rank in "01":
        (tmp_path / rank).mkdir()
        shutil.copytree(packed_folder, tmp_path / rank / "set")
    labels = np.load(tmp_path / "1" / "set" / "labels.npy")
    np.save(tmp_path / "1" / "set" / "labels.npy", labels[::-1].copy())
    script = tmp_path / "there.py"
    script.write_text(f"import os, sys\nos.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\nimport haste_train\nhaste_train.main(sys.argv[1:])\n")
    words = [*torchrun(2), script, *HASTE[1:], "--data", "set", "--out", tmp_path / "run", "--teacher-weights", small_teacher]
    text = finish(start(words, tmp_path / "log.txt"), code=1)
    assert re.search(r"rank 1 .* has --data set with the fingerprint \w+, but rank 0 .*: copy the data", text)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    # a copy that is not there at all
    shutil.rmtree(tmp_path / "1" / "set")
    text = finish(start(words, tmp_path / "log.txt"), code=1)
    assert re.search(r"rank 1 .*: --data set is not a folder.*; not all processes have this problem", text)


def test_a_run_resumes_with_another_number_of_processes(tmp_path, small_teacher):
    """Two processes, then one, then two with accumulation: the curve of one, to rounding."""
    train(1, "--steps", "18", "--stop", "9", out=tmp_path / "straight", teacher=small_teacher)
    flags = ["--resume", "auto", "--stop", "9"]
    for processes, steps, extra in ((2, "6", []), (1, "12", []), (2, "18", ["--accumulate", "2"])):
        train(processes, *flags, "--steps", steps, *extra, out=tmp_path / "run",
              teacher=small_teacher)
    assert_close([rows_of(tmp_path / "straight"), rows_of(tmp_path / "run")], 18, tolerance=1e-4)


@pytest.mark.parametrize("kills", [0, 3])
def test_two_nodes_are_one(tmp_path, small_teacher, kills):
    """Two torchrun agents with a worker each, as on two machines, give one agent's weights.

    Bit for bit, also if workers are killed, now on one, now on the other: the agents then count
    restarts differently.
    """
    flags = ["--steps", "400", "--stop", "6", "--resume", "auto", "--save-every", "10"]
    out = tmp_path / "nodes"
    words = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
             f"--max-restarts={kills}", "--rdzv_backend=c10d", "--rdzv_id=test",
             f"--rdzv_endpoint=127.0.0.1:{free_port()}", *HASTE, "--out", out,
             "--teacher-weights", small_teacher, *flags]
    nodes = [start(words, tmp_path / f"node{i}.txt") for i in range(2)]
    try:
        for i in range(kills):
            wait_for_step(nodes[0], out, steps_in(out) + 15)
            kill(workers_of(nodes[i % 2])[0])
        texts = [finish(node) for node in nodes]
    finally:
        for node in nodes:
            kill_all(node)
    assert sum(text.count("resuming from step") for text in texts) == kills
    train(2, *flags, out=tmp_path / "one", teacher=small_teacher)
    assert_same_run(out, tmp_path / "one")


def test_random_kills_change_nothing(tmp_path):
    words = ["tests/kills.py", "--kills", "4", "--steps", "2500", "--out", tmp_path / "kills"]
    text = finish(start(words, tmp_path / "kills.txt"), timeout=900)
    assert text.count("| identical |") == 2


# ---- packed data

def start_preparing(processes, out, photos, net, *flags):
    words = ["prepare.py", photos, out, "--size", "16", "--vae", net, "--device", "cpu",
             "--batch-size", "1"]
    return start([*torchrun(processes), *words, *flags], f"{out}.txt")


def test_preparation_is_the_same_for_any_number_of_processes(tmp_path, packed_folder):
    """Three processes, one of them killed, the rest by one process: the same arrays."""
    photos = packed_folder.parent / "photos"
    net = packed_folder.parent / "vae.pt"
    killed = tmp_path / "killed"
    process = start_preparing(3, killed, photos, net, "--mirror")
    wait_until((killed / "data.json").exists, process)
    kill_all(process)
    finish(start_preparing(1, killed, photos, net, "--mirror"))
    finish(start_preparing(3, tmp_path / "three", photos, net, "--mirror"))
    for name in ("images", "moments", "labels", "done"):
        whole = np.load(packed_folder / f"{name}.npy").astype(float)
        for folder in (killed, tmp_path / "three"):
            array = np.load(folder / f"{name}.npy").astype(float)
            assert np.allclose(whole, array, atol=1e-2), name               # a batch's rounding
    assert json.loads((killed / "data.json").read_text())["complete"]


@pytest.mark.parametrize("program", [HASTE, XAR], ids=["haste", "xar"])
def test_packed_training_on_two_processes_is_that_on_one(tmp_path, small_teacher, packed_folder,
                                                         program):
    flags = ["--steps", "12", "--mirror", "--data", packed_folder]
    teacher = small_teacher if program is HASTE else None
    if teacher:
        flags += ["--stop", "6"]
    assert_close(three_ways(tmp_path, *flags, program=program, teacher=teacher), 12)


def test_sampling_resumes_with_another_number_of_processes(tmp_path, packed_folder, small_teacher):
    train(1, "--steps", "2", "--data", packed_folder, out=tmp_path / "run", teacher=small_teacher)
    command = ["sample.py", "--ckpt", tmp_path / "run" / "ckpt.pt", "--samples", "40",
               "--steps", "40", "--device", "cpu"]

    def draw(processes, name, batch):
        words = [*torchrun(processes), *command, "--batch-size", batch,
                 "--out", tmp_path / f"{name}.npz"]
        return start(words, tmp_path / f"{name}.txt")

    finish(draw(1, "one", 2))
    parts = tmp_path / "two.npz.parts"
    process = draw(2, "two", 2)
    wait_until(lambda: len(list(parts.glob("*.npy"))) >= 3, process)
    kill_all(process)
    whole = {part.name for part in parts.glob("*.npy")}
    assert 3 <= len(whole) < 20 and not (tmp_path / "two.npz").exists()
    assert whole < {f"{begin:08d}_{begin + 2:08d}.npy" for begin in range(0, 40, 2)}
    text = finish(draw(3, "two", 3))                                        # also with another batch
    left = 40 - 2 * len(whole)
    assert f"{left} of {left} images" in text                               # no whole part was drawn again
    with np.load(tmp_path / "one.npz") as a, np.load(tmp_path / "two.npz") as b:
        assert a["arr_0"].shape == (40, 16, 16, 3)
        assert abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
        assert np.array_equal(a["arr_1"], b["arr_1"])


def test_full_scale_from_photographs_to_scores(tmp_path):
    """Every command of a run on ImageNet, small: on real photographs if they are at hand."""
    archive = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"
    photos = tmp_path / "photos"
    if archive.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(photos, filter="data")
        photos /= "imagenet_sample"
    else:
        photographs(photos, classes="abcdefgh", each=2)
    words = ["tests/full_scale.py", photos, "--out", tmp_path / "full"]
    finish(start(words, tmp_path / "full.txt"), timeout=1800)
    shutil.rmtree(tmp_path / "full")                                        # a gigabyte of weights


# ---- fid.py

def test_fid_is_the_same_for_any_number_of_processes(tmp_path):
    """Scores and errors of three processes, one of which has no images at all, are those of one."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (44, 8, 8, 3), dtype=torch.uint8, generator=g)
    torch.save(images[:4].permute(0, 3, 1, 2).clone(), tmp_path / "a.pt")
    (tmp_path / "b").mkdir()
    for i, image in enumerate(images[4:].numpy()):
        Image.fromarray(image).save(tmp_path / "b" / f"{i:02}.png")

    def score(processes):
        words = ["fid.py", tmp_path / "a.pt", tmp_path / "b", "--features", "pixels", "--json"]
        return subprocess.run([sys.executable, *torchrun(processes), *words], cwd=ROOT, env=ENV,
                              capture_output=True, text=True)

    done = [score(1), score(3)]
    assert [d.returncode for d in done] == [0, 0], done[1].stderr[-2000:]
    one, three = (json.loads(d.stdout) for d in done)
    assert one.keys() == three.keys() and {"fd", "precision", "recall", "kid"} < one.keys()
    for name, value in three.items():
        if not isinstance(value, str):
            value = pytest.approx(value, rel=1e-9, abs=1e-12)
        assert one[name] == value, name
    Image.new("RGB", (9, 8)).save(tmp_path / "b" / "39.png")                # read by the last process only
    for processes in (1, 3):
        assert "fid.py: images of mixed sizes" in score(processes).stderr


# ---- xAR

@pytest.mark.parametrize("flags", [[], ["--context", "clean"], ["--entity", "subsample:2"]], ids=" ".join)
def test_aligned_xar_on_two_processes_is_that_on_one(tmp_path, small_teacher, flags):
    """Across the end of the alignment, where DDP's wrapper is rebuilt."""
    flags = [*GUIDED_XAR, "--steps", "12", "--stop", "6", "--lr", "0.005", *flags]
    logs = three_ways(tmp_path, *flags, program=XAR, teacher=small_teacher)
    for key in ("loss", "feature_loss", "attention_loss"):
        assert_close(logs, 12, key)
    assert ["feature_loss" in r for r in logs[1]] == [True] * 6 + [False] * 6


def test_aligned_xar_resumes_and_stops_by_itself_on_two_processes(tmp_path, small_teacher):
    flags = [*GUIDED_XAR, "--warmup", "0", "--decay", "0", "--stop", "auto", "--stop-warmup", "2", "--stop-interval", "2",
             "--stop-threshold", "1", "--resume", "auto"]
    train(2, *flags, "--steps", "6", out=tmp_path / "straight", program=XAR, teacher=small_teacher)
    for steps in ("2", "6"):
        train(2, *flags, "--steps", steps, out=tmp_path / "parts", program=XAR, teacher=small_teacher)
    straight, parts = (checkpoint(tmp_path / name) for name in ("straight", "parts"))
    assert same_weights(straight, parts, ("model", "ema", "opt", "projector")) and straight["tau"] == parts["tau"] == 2


@pytest.mark.parametrize("entity, context", [("cell:4", "random"), ("scale", "clean")])
def test_xar_on_two_processes_is_xar_on_one(tmp_path, entity, context):
    flags = ["--steps", "20", "--mirror", "--entity", entity, "--context", context,
             "--eval-every", "20"]
    logs = three_ways(tmp_path, *flags, program=XAR)
    assert_close(logs, 20)
    one, two, _ = (rows[-1]["fd"] for rows in logs)
    assert abs(one - two) < 1e-2 * one


def test_killed_xar_resumes_bit_for_bit_on_two_processes_with_dropout(tmp_path):
    flags = ["--resume", "auto", "--save-every", "5", "--steps", "300", "--dropout", "0.2",
             "--attn-dropout", "0.2"]
    process = start_training(2, *flags, out=tmp_path / "run", program=XAR)
    wait_for_step(process, tmp_path / "run", 12)
    kill_all(process)
    assert "resuming from step" in train(2, *flags, out=tmp_path / "run", program=XAR)
    train(2, *flags, out=tmp_path / "straight", program=XAR)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_xar_samples_do_not_depend_on_the_number_of_processes(tmp_path):
    train(1, "--steps", "2", out=tmp_path / "run", program=XAR)
    images = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.npz"
        words = ["sample.py", "--ckpt", tmp_path / "run" / "ckpt.pt", "--samples", "5",
                 "--steps", "3", "--device", "cpu", "--batch-size", "2", "--out", out]
        finish(start([*torchrun(processes), *words], f"{out}.txt"))
        images.append(np.load(out)["arr_0"].astype(int))
    assert images[0].shape == (5, 8, 8, 3) and abs(images[0] - images[1]).max() <= 1


def test_compiled_aligned_xar_does_not_recompile_at_its_end(tmp_path, small_teacher):
    """Its blocks are compiled twice, with taps and without, in the first step."""
    flags = [*GUIDED_XAR, "--steps", "10", "--stop", "5", "--lr", "1e-3"]
    train(1, *flags, out=tmp_path / "eager", program=XAR, teacher=small_teacher)
    text = train(1, *flags, "--compile", out=tmp_path / "compiled", program=XAR, teacher=small_teacher,
                 env={"TORCH_LOGS": "recompiles"})
    for a, b in zip(rows_of(tmp_path / "eager"), rows_of(tmp_path / "compiled")):
        assert abs(a["loss"] / b["loss"] - 1) < 0.02, a["step"]
    assert len(re.findall("Recompiling function", text)) == 1, text


def test_xar_precision_and_compile(tmp_path):
    flags = ["--steps", "10", "--lr", "1e-3"]
    train(1, *flags, out=tmp_path / "fp32", program=XAR)
    for name, extra in (("bf16", ["--precision", "bf16"]), ("compiled", ["--compile"])):
        train(1, *flags, *extra, out=tmp_path / name, program=XAR)
        for a, b in zip(rows_of(tmp_path / "fp32"), rows_of(tmp_path / name)):
            assert abs(a["loss"] / b["loss"] - 1) < 0.02, (name, a["step"])
