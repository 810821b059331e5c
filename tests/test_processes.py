"""Many processes, killed processes, compiled processes. Each test starts some: `python -m pytest -m slow`."""
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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_XAR, photographs, rows_of, same_weights

pytestmark = pytest.mark.slow
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
HASTE, XAR = ("haste_train.py", *TINY), ("xar.py", *TINY_XAR)


def start(processes, *flags, out, teacher=None, env=(), program=HASTE, evaluation=("--eval-every", "0"), **kwargs):
    """Popen of a program, under torchrun where there are several processes; output goes to OUT.txt."""
    launch = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      f"--nproc_per_node={processes}", *kwargs.pop("torchrun", [])]
    usual = [] if evaluation is None else [*evaluation, "--out", str(out)]                  # data.py has neither
    command = [*launch, str(ROOT / program[0]), *program[1:], *usual, *flags]
    command += ["--teacher-weights", str(teacher)] if teacher else []
    with open(f"{out}.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**ENV, **dict(env)}, start_new_session=True)


def finish(process, out, code=0, timeout=300):
    try:
        assert process.wait(timeout) == code, Path(f"{out}.txt").read_text()[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Path(f"{out}.txt").read_text()


def go(processes, *flags, out, **kwargs):
    return finish(start(processes, *flags, out=out, **kwargs), out)


def checkpoint(out):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)


def workers_of(process):
    """Process ids of torchrun's workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid and str(ROOT) in (stat.parent / "cmdline").read_text():
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            pass
    return sorted(found)


def wait_for_step(out, step, timeout=120):
    """Until log.jsonl holds this step."""
    until = time.time() + timeout
    while time.time() < until:
        if ((Path(out) / "log.jsonl").exists()
            and any(r.get("step", 0) >= step
                    for r in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()[:-1]))):
            return
        time.sleep(0.02)
    raise TimeoutError(Path(f"{out}.txt").read_text()[-3000:])


def test_two_processes_are_one(tmp_path, small_teacher):
    """Same loss curve for one process, two processes, and two with accumulation, across the end of the guidance."""
    flags = ["--steps", "20", "--stop", "10", "--mirror"]
    for name, n, extra in (("one", 1, []), ("two", 2, []), ("parts", 2, ["--accumulate", "2"])):
        go(n, *flags, *extra, out=tmp_path / name, teacher=small_teacher)
    one, two, parts = (rows_of(tmp_path / n) for n in ("one", "two", "parts"))
    for a, b, c in zip(one, two, parts):
        assert a.keys() == b.keys() == c.keys() and ("feature_loss" in a) == (a["step"] <= 10)
        for k, tolerance in (("loss", 1e-5), ("feature_loss", 1e-5), ("attention_loss", 1e-5), ("grad_norm", 1e-4)):
            assert k not in a or max(abs(a[k] - b[k]), abs(a[k] - c[k])) < tolerance * max(1, abs(a[k])), (a["step"], k)
    assert len(one) == len(two) == 20


def test_resume_on_two_processes_is_bit_for_bit(tmp_path, small_teacher):
    flags = ["--resume", "auto", "--stop", "4"]
    go(2, *flags, "--steps", "8", out=tmp_path / "straight", teacher=small_teacher)
    for steps in ("3", "6", "8"):
        go(2, *flags, "--steps", steps, out=tmp_path / "parts", teacher=small_teacher)
    assert same_weights(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "parts"))
    assert rows_of(tmp_path / "straight") == rows_of(tmp_path / "parts")
    # on another number of processes
    text = go(1, *flags, "--steps", "9", out=tmp_path / "parts", teacher=small_teacher)
    assert "going on from step 8" in text and checkpoint(tmp_path / "parts")["steps"] == 9


@pytest.mark.parametrize("processes,whom", [(1, "all"), (2, "one"), (2, "all")])
def test_sigterm_saves_and_exits_with_0(tmp_path, small_teacher, processes, whom):
    """A signal to any process ends all after the same step; the same command then reaches the undisturbed weights."""
    flags = ["--resume", "auto", "--steps", "4000", "--stop", "20"]
    process = start(processes, *flags, out=tmp_path / "run", teacher=small_teacher)
    wait_for_step(tmp_path / "run", 10)
    targets = [process.pid] if processes == 1 else workers_of(process)
    assert len(targets) == processes
    for pid in targets if whom == "all" else targets[-1:]:
        os.kill(pid, signal.SIGTERM)
    text = finish(process, tmp_path / "run", code=0)
    done = checkpoint(tmp_path / "run")["steps"]
    assert 10 <= done < 4000 and f"stopped by a signal after step {done}" in text
    goal = str(done + 5)
    go(processes, *flags[:-4], "--stop", "20", "--steps", goal, out=tmp_path / "run", teacher=small_teacher)
    go(processes, *flags[:-4], "--stop", "20", "--steps", goal, out=tmp_path / "straight", teacher=small_teacher)
    assert same_weights(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "straight"))


def test_sigterm_to_torchrun_itself_loses_nothing(tmp_path, small_teacher):
    process = start(2, "--resume", "auto", "--steps", "4000", out=tmp_path / "run", teacher=small_teacher)
    wait_for_step(tmp_path / "run", 5)
    # torchrun hands it to its workers, and itself exits with 1
    process.terminate()
    process.wait(60)
    assert checkpoint(tmp_path / "run")["steps"] >= 5 and "stopped by a signal" in (tmp_path / "run.txt").read_text()


def test_kill_at_random_moments_leaves_a_loadable_checkpoint(tmp_path, small_teacher):
    """kill -9 while a checkpoint is written at every step; the survivor reaches the undisturbed run's weights."""
    rng, flags = random.Random(0), ["--resume", "auto", "--save-every", "1", "--stop", "30"]
    for i in range(5):
        process = start(1, *flags, "--steps", "4000", out=tmp_path / "run", teacher=small_teacher)
        wait_for_step(tmp_path / "run", (checkpoint(tmp_path / "run")["steps"] if i else 0) + 3)
        time.sleep(rng.random() / 2)
        process.kill()
        process.wait()
        saved = checkpoint(tmp_path / "run")                                # readable, whatever was going on
    goal = str(saved["steps"] + 3)
    go(1, *flags, "--steps", goal, out=tmp_path / "run", teacher=small_teacher)
    go(1, *flags, "--save-every", "0", "--steps", goal, out=tmp_path / "straight", teacher=small_teacher)
    assert same_weights(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "straight"))
    assert (rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
            and not list((tmp_path / "run").glob("*.partial")))


def test_a_worker_that_dies_is_restarted(tmp_path, small_teacher):
    flags = ["--resume", "auto", "--save-every", "5", "--steps", "60", "--stop", "30"]
    process = start(2, *flags, out=tmp_path / "run", teacher=small_teacher, torchrun=["--max-restarts=2"])
    wait_for_step(tmp_path / "run", 12)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    text = finish(process, tmp_path / "run")
    assert "going on from step" in text
    go(2, *flags, out=tmp_path / "straight", teacher=small_teacher)
    assert same_weights(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "straight"))


@pytest.mark.parametrize("flags,message", [
    (["--batch-size", "9"], "--batch-size 9 must be a multiple of 2 (processes x --accumulate)"),
    (["--data", "nowhere"], "--data nowhere is no folder"),
    (["--teacher-weights", "nowhere.pt"], "nowhere.pt do not exist"),
    (["--teacher", "dino"], "teacher 'dino' is neither small nor"),
])
def test_errors_of_many_processes_are_one_line(tmp_path, flags, message):
    process = start(2, *flags, out=tmp_path / "run")
    text = finish(process, tmp_path / "run", code=1)
    assert message in text and "haste_train.py\", line" not in text and text.count("haste_train.py: ") == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_precision_and_compile(tmp_path, small_teacher, processes):
    """Ten steps across the end of the guidance: bf16 and compiled runs stay within 2 % of fp32, one recompilation.

    At a moderate learning rate: TINY's, twenty times higher, amplifies any rounding until it shows in the loss.
    """
    flags = ["--steps", "10", "--stop", "5", "--lr", "1e-3"]
    go(processes, *flags, "--precision", "fp32", out=tmp_path / "fp32", teacher=small_teacher)
    reference = rows_of(tmp_path / "fp32")
    for name, extra in (("bf16", ["--precision", "bf16"]), ("compiled", ["--compile"]),
                        ("both", ["--precision", "bf16", "--compile"])):
        text = go(processes, *flags, *extra, out=tmp_path / name, teacher=small_teacher,
                  env={"TORCH_LOGS": "recompiles"})
        for a, b in zip(reference, rows_of(tmp_path / name)):
            assert abs(a["loss"] / b["loss"] - 1) < 0.02, (name, a["step"])
        assert len(re.findall("Recompiling function", text)) == (processes if "--compile" in extra else 0), text
        assert all(w.dtype == torch.float32 for w in checkpoint(tmp_path / name)["model"].values())


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, small_teacher):
    """Two processes, then one, then two with accumulation: the loss curve of one process alone, to rounding."""
    go(1, "--steps", "18", "--stop", "9", out=tmp_path / "straight", teacher=small_teacher)
    flags = ["--resume", "auto", "--stop", "9"]
    for processes, steps, extra in ((2, "6", []), (1, "12", []), (2, "18", ["--accumulate", "2"])):
        go(processes, *flags, "--steps", steps, *extra, out=tmp_path / "run", teacher=small_teacher)
    a, b = rows_of(tmp_path / "straight"), rows_of(tmp_path / "run")
    assert [r["step"] for r in a] == [r["step"] for r in b] == list(range(1, 19))
    assert all(abs(r["loss"] - s["loss"]) < 1e-4 * r["loss"] for r, s in zip(a, b))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("kills", [0, 3])
def test_two_nodes_are_one(tmp_path, small_teacher, kills):
    """Two torchrun agents with a worker each, as on two machines, give one agent's weights bit for bit.

    Also when workers are killed, now on one, now on the other: their agents count restarts differently.
    """
    flags, port = ["--steps", "400", "--stop", "6", "--resume", "auto", "--save-every", "10"], free_port()
    nodes = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--max-restarts={kills}",
         "--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint=127.0.0.1:{port}", str(ROOT / HASTE[0]), *TINY,
         "--eval-every", "0", "--out", str(tmp_path / "nodes"), "--teacher-weights", str(small_teacher), *flags],
        stdout=open(tmp_path / f"node{i}.txt", "w"), stderr=subprocess.STDOUT, env=ENV, start_new_session=True)
        for i in range(2)]
    try:
        for i in range(kills):
            seen = len(rows_of(tmp_path / "nodes")) if (tmp_path / "nodes" / "log.jsonl").exists() else 0
            wait_for_step(tmp_path / "nodes", seen + 15)
            os.kill(workers_of(nodes[i % 2])[0], signal.SIGKILL)
        for n in nodes:
            n.wait(300)
    finally:
        for n in nodes:
            if n.poll() is None:
                os.killpg(n.pid, signal.SIGKILL)
    texts = [(tmp_path / f"node{i}.txt").read_text() for i in range(2)]
    assert [n.returncode for n in nodes] == [0, 0], texts[0][-2000:] + texts[1][-2000:]
    assert sum(t.count("going on from step") for t in texts) == kills
    go(2, *flags, out=tmp_path / "one", teacher=small_teacher)
    assert same_weights(checkpoint(tmp_path / "nodes"), checkpoint(tmp_path / "one"))
    assert rows_of(tmp_path / "nodes") == rows_of(tmp_path / "one")


def test_random_kills_change_nothing(tmp_path):
    subprocess.run([sys.executable, str(ROOT / "experiments" / "kills.py"), "--kills", "4", "--steps", "2500", "--out",
                    str(tmp_path / "kills")], check=True, env=ENV)


# ---- packed data

def prepared(processes, out, photos, net, *flags, **kwargs):
    return start(processes, str(photos), str(out), "--size", "16", "--vae", str(net), "--device", "cpu",
                 "--batch-size", "1", *flags, out=out, evaluation=None, program=("data.py", "prepare"), **kwargs)


def test_preparation_is_the_same_for_any_number_of_processes(tmp_path, packed_folder):
    """Three processes, one of them killed, the rest by one process: the same arrays."""
    photos, net = packed_folder.parent / "photos", packed_folder.parent / "vae.pt"
    process = prepared(3, tmp_path / "set", photos, net, "--mirror")
    until = time.time() + 120
    while time.time() < until and not (tmp_path / "set" / "data.json").exists():
        time.sleep(0.01)
    for pid in (*workers_of(process), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    finish(prepared(1, tmp_path / "set", photos, net, "--mirror"), tmp_path / "set")
    finish(prepared(3, tmp_path / "three", photos, net, "--mirror"), tmp_path / "three")
    for name in ("images", "moments", "labels", "done"):
        a, b, c = (np.load(folder / f"{name}.npy").astype(float)
                   for folder in (packed_folder, tmp_path / "set", tmp_path / "three"))
        assert np.allclose(a, b, atol=1e-2) and np.allclose(a, c, atol=1e-2), name          # a batch's rounding
    assert json.loads((tmp_path / "set" / "data.json").read_text())["complete"]


def test_packed_training_on_two_processes_is_that_on_one(tmp_path, small_teacher, packed_folder):
    for program, teacher in ((HASTE, small_teacher), (XAR, None)):
        flags = ["--steps", "12", "--mirror", "--data", str(packed_folder)]
        flags += ["--stop", "6"] if teacher else []
        for name, n, extra in (("one", 1, []), ("two", 2, []), ("parts", 2, ["--accumulate", "2"])):
            go(n, *flags, *extra, out=tmp_path / name, program=program, teacher=teacher)
        one, two, parts = (rows_of(tmp_path / n) for n in ("one", "two", "parts"))
        assert len(one) == 12
        for a, b, c in zip(one, two, parts):
            assert max(abs(a["loss"] - b["loss"]), abs(a["loss"] - c["loss"])) < 1e-5 * max(1, a["loss"]), a["step"]


def test_sampling_goes_on_with_another_number_of_processes(tmp_path, packed_folder, small_teacher):
    go(1, "--steps", "2", "--data", str(packed_folder), out=tmp_path / "run", teacher=small_teacher)
    flags = ["--num", "40", "--steps", "40", "--batch-size", "2", "--device", "cpu"]
    program = ("sit.py", "--ckpt", str(tmp_path / "run" / "ckpt.pt"))
    kwargs = dict(evaluation=(), program=program, torchrun=["--"])          # --: torchrun has a --num... of its own
    go(1, *flags, out=tmp_path / "one.npz", **kwargs)
    process, parts = start(2, *flags, out=tmp_path / "two.npz", **kwargs), tmp_path / "two.npz.parts"
    until = time.time() + 120
    while time.time() < until and len(list(parts.glob("*.npy"))) < 3:
        time.sleep(0.01)
    for pid in (*workers_of(process), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(parts.glob("*.npy"))) < 20 and not (tmp_path / "two.npz").exists()
    go(3, *flags, out=tmp_path / "two.npz", **kwargs)
    with np.load(tmp_path / "one.npz") as a, np.load(tmp_path / "two.npz") as b:
        assert a["arr_0"].shape == (40, 16, 16, 3) and abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
        assert np.array_equal(a["arr_1"], b["arr_1"])


def test_full_scale_from_photographs_to_scores(tmp_path):
    """Every command of a run on ImageNet, at small sizes: on real photographs where they are at hand, else drawn."""
    archive, photos = ROOT.parent / "shared" / "data" / "imagenet_sample.tar", tmp_path / "photos"
    if archive.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(photos, filter="data")
        photos /= "imagenet_sample"
    else:
        photographs(photos, classes="abcdefgh", each=2)
    subprocess.run([sys.executable, str(ROOT / "experiments" / "full_scale.py"), str(photos), "--out",
                    str(tmp_path / "full")], check=True, env=ENV)
    shutil.rmtree(tmp_path / "full")                                        # a gigabyte of weights


def test_benchmarks_of_packed_data_run(tmp_path):
    out = ["--out", str(tmp_path / "bench")]
    for command in (["loader", "--count", "600", "--size", "32"],
                    ["train", "--device", "cpu", "--steps", "4", "--count", "10", "--model", "SiT-Ti/8", "--batch-size",
                     "2", "--log-every", "1"]):
        done = subprocess.run([sys.executable, str(ROOT / "bench.py"), *command, *out], capture_output=True, text=True)
        assert done.returncode == 0 and not list((tmp_path / "bench").iterdir()), done.stderr[-2000:]
        assert ("samples/s" if command[0] == "loader" else "waited for data") in done.stdout


# ---- fid.py

def test_fid_is_the_same_for_any_number_of_processes(tmp_path):
    """Three processes, one of which has no images at all, and metrics of whole sets: as one process. Errors as well."""
    from PIL import Image
    images = torch.randint(0, 256, (44, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.save(images[:4].permute(0, 3, 1, 2).clone(), tmp_path / "a.pt")
    (tmp_path / "b").mkdir()
    for i, image in enumerate(images[4:].numpy()):
        Image.fromarray(image).save(tmp_path / "b" / f"{i:02}.png")

    def call(*launch):
        words = ["fid.py", str(tmp_path / "a.pt"), str(tmp_path / "b"), "--features", "pixels", "--json"]
        return subprocess.run([sys.executable, *launch, *words], cwd=ROOT, env=ENV, capture_output=True, text=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    done = [call(), call(*torchrun)]
    assert [d.returncode for d in done] == [0, 0], done[1].stderr[-2000:]
    one, three = (json.loads(d.stdout) for d in done)
    assert one.keys() == three.keys() and {"fd", "precision", "recall", "kid"} < one.keys()
    assert all(one[k] == (v if isinstance(v, str) else pytest.approx(v, rel=1e-9, abs=1e-12)) for k, v in three.items())
    Image.new("RGB", (9, 8)).save(tmp_path / "b" / "39.png")                # read by the last process only
    for launch in ((), torchrun):
        assert "fid.py: images of mixed sizes" in call(*launch).stderr


# ---- xAR

def test_xar_on_two_processes_is_xar_on_one(tmp_path):
    for entity, context in (("cell:4", "random"), ("scale", "clean")):
        flags = ["--steps", "20", "--mirror", "--entity", entity, "--context", context, "--eval-every", "20"]
        for name, n, extra in (("one", 1, []), ("two", 2, []), ("parts", 2, ["--accumulate", "2"])):
            go(n, *flags, *extra, out=tmp_path / name, program=XAR)
        one, two, parts = (rows_of(tmp_path / n) for n in ("one", "two", "parts"))
        assert len(one) == len(two) == 20
        for a, b, c in zip(one, two, parts):
            assert max(abs(a["loss"] - b["loss"]), abs(a["loss"] - c["loss"])) < 1e-5 * max(1, a["loss"]), a["step"]
        assert abs(one[-1]["fd"] - two[-1]["fd"]) < 1e-2 * one[-1]["fd"]


def test_killed_xar_goes_on_bit_for_bit_on_two_processes_with_dropout(tmp_path):
    flags = ["--resume", "auto", "--save-every", "5", "--steps", "300", "--dropout", "0.2", "--attn-dropout", "0.2"]
    process = start(2, *flags, out=tmp_path / "run", program=XAR)
    wait_for_step(tmp_path / "run", 12)
    for pid in (*workers_of(process), process.pid):                         # workers have sessions of their own
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert "going on from step" in go(2, *flags, out=tmp_path / "run", program=XAR)
    go(2, *flags, out=tmp_path / "straight", program=XAR)
    assert same_weights(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "straight"))


def test_xar_samples_do_not_depend_on_the_number_of_processes(tmp_path):
    go(1, "--steps", "2", out=tmp_path / "run", program=XAR)
    files = [tmp_path / f"{n}.npz" for n in (1, 2)]
    for n, file in zip((1, 2), files):
        go(n, "--num", "5", "--steps", "3", "--device", "cpu", out=file, evaluation=(), torchrun=["--"],
           program=("xar.py", "sample", "--ckpt", str(tmp_path / "run" / "ckpt.pt")))       # --: torchrun has --num...
    a, b = (np.load(f)["arr_0"].astype(int) for f in files)
    assert a.shape == (5, 8, 8, 3) and abs(a - b).max() <= 1


def test_xar_precision_and_compile(tmp_path):
    flags = ["--steps", "10", "--lr", "1e-3"]
    go(1, *flags, out=tmp_path / "fp32", program=XAR)
    for name, extra in (("bf16", ["--precision", "bf16"]), ("compiled", ["--compile"])):
        go(1, *flags, *extra, out=tmp_path / name, program=XAR)
        for a, b in zip(rows_of(tmp_path / "fp32"), rows_of(tmp_path / name)):
            assert abs(a["loss"] / b["loss"] - 1) < 0.02, (name, a["step"])
