"""sample.py: any checkpoint of any model; pictures, animations, and resumable thousands; bad input is one line."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_XAR, tiny_vae
from fill import fill_state_dict
from PIL import Image
from test_dit import trained

import dit
import evaluate
import fid
import haste_train
import models
import run
import sample as program
import sit
import xar
import xar_train


@pytest.fixture(scope="module")
def checkpoints(packed_folder, small_teacher, tmp_path_factory):
    """{name: checkpoint} of all models, of pixels and of packed latents."""
    out = tmp_path_factory.mktemp("runs")
    teacher = ["--teacher-weights", str(small_teacher)]
    flags = ["--eval-every", "0", "--ema", "0"]
    packed = ["--data", str(packed_folder), "--eval-every", "0", "--steps", "2"]
    haste_train.main([*TINY, *flags, *teacher, "--out", str(out / "sit")])
    xar_train.main([*TINY_XAR, *flags, "--out", str(out / "xar")])
    haste_train.main([*TINY, *packed, *teacher, "--out", str(out / "sit_latents")])
    xar_train.main([*TINY_XAR, *packed, "--out", str(out / "xar_latents")])
    model, arch = trained("ddpm")
    (out / "dit").mkdir()
    torch.save({"ema": model.state_dict(), "args": {"objective": "ddpm"}, "arch": arch}, out / "dit" / "ckpt.pt")
    return {name: out / name / "ckpt.pt" for name in ("sit", "dit", "xar", "sit_latents", "xar_latents")}


@pytest.fixture
def draw(checkpoints, tmp_path):
    """Call sample.py on a checkpoint; returns what it has written: a dict of arrays, or a PIL image."""
    def call(name, *flags, out="x.npz"):
        path = tmp_path / out
        program.main(["--ckpt", str(checkpoints[name]), "--steps", "3", "--cfg", "1.5", "--device", "cpu",
                      "--out", str(path), *flags])
        if out.endswith("npz"):
            with np.load(path) as f:
                return {k: f[k] for k in f.files}
        return Image.open(path)
    return call


MODELS = pytest.mark.parametrize("name", ["sit", "dit", "xar"])
LATENTS = pytest.mark.parametrize("name", ["sit_latents", "xar_latents"])


# ---- what the flags do

@pytest.mark.parametrize("name,flags", [
    *[("sit", f) for f in (["--sampler", "ode"], ["--sampler", "heun"], ["--interval", "0", "0.5"],
                           ["--path", "cosine"])],
    *[(name, f) for name in ("sit", "dit", "xar")
      for f in (["--labels", "random"], ["--cfg", "3"], ["--seed", "1"], ["--steps", "4"], ["--label", "3"],
                ["--precision", "bf16"], ["--to-uint8", "truncate"])]])
def test_every_flag_changes_something(draw, name, flags):
    base, other = draw(name, "--samples", "12"), draw(name, "--samples", "12", *flags, out="y.npz")
    assert other["arr_0"].shape == base["arr_0"].shape == (12, 8, 8, 3)
    assert not np.array_equal(base["arr_0"], other["arr_0"])
    if flags[0] == "--label":
        assert np.array_equal(other["arr_0"][3], base["arr_0"][3])          # sample 3 had that label before
        assert other["arr_1"].tolist() == [3] * 12


@MODELS
def test_samples_depend_on_their_index_alone(draw, name):
    whole = draw(name, "--samples", "12")
    found, labels = whole["arr_0"].astype(int), whole["arr_1"]
    assert labels.tolist() == [i % 10 for i in range(12)] and (found == found[..., :1]).all()         # grey
    parts = draw(name, "--samples", "12", "--batch-size", "5", out="b.npz")
    assert abs(parts["arr_0"] - found).max() <= 1                           # the batch size changes only rounding
    assert np.array_equal(draw(name, "--samples", "9", out="c.npz")["arr_0"], found[:9])
    grid = draw(name, "--samples", "12", out="d.png")
    assert grid.size == ((10 * 9 - 1) * 8, (2 * 9 - 1) * 8)
    assert np.array_equal(np.array(grid)[::8, ::8][:8, :8], found[0])


@LATENTS
def test_latents_are_decoded_and_bytes_rounded(draw, name, tmp_path):
    one = draw(name, "--samples", "7")
    assert one["arr_0"].shape == (7, 16, 16, 3) and one["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (tmp_path / "x_grid.png").exists() and not list(tmp_path.glob("*.parts"))
    cut = draw(name, "--samples", "7", "--to-uint8", "truncate", out="cut.npz")["arr_0"].astype(int)
    assert 0 < (one["arr_0"].astype(int) - cut).mean() < 1 and (one["arr_0"].astype(int) - cut).min() >= 0
    labels = draw(name, "--samples", "40", "--labels", "random", out="random.npz")["arr_1"]
    assert np.bincount(labels).tolist() != [14, 13, 13] and set(labels) == {0, 1, 2}
    assert fid.open_images(str(tmp_path / "x.npz"))[0][0:7].shape == (7, 3, 16, 16)          # as fid.py reads it


@pytest.mark.parametrize("name", ["sit", "dit", "xar", "sit_latents", "xar_latents"])
def test_animation_ends_in_the_samples(draw, name):
    animation, grid = draw(name, "--samples", "6", out="x.gif"), draw(name, "--samples", "6", out="x.png")
    entities = 4                                                            # of TINY_XAR: one frame each
    assert animation.n_frames == (entities if "xar" in name else 4)
    assert 2 * animation.size[0] == grid.size[0]                            # half as large as a picture
    frames = []
    for i in range(animation.n_frames):
        animation.seek(i)
        frames.append(np.asarray(animation.convert("RGB")).astype(int))
    last = np.asarray(grid.resize(animation.size, Image.NEAREST)).astype(int)
    assert abs(frames[-1] - last).mean() < 12                               # but for each frame's few colours
    assert abs(frames[0] - last).mean() > abs(frames[-1] - last).mean()


def test_animation_has_at_most_so_many_frames(draw):
    assert draw("sit", "--samples", "2", "--steps", "100", out="x.gif").n_frames <= program.FRAMES
    assert draw("sit", "--samples", "2", "--steps", "24", out="x.gif").n_frames <= program.FRAMES


@pytest.fixture
def bare_dit(tmp_path):
    """File of a DiT of latents as DiT's authors publish it: it does not say what it is."""
    model = sit.SiT(8, 2, 4, 32, 2, 2, 10, learn_sigma=True, keep_sigma=True)
    torch.save(fill_state_dict(model.state_dict(), skip=("pos_embed",)), tmp_path / "bare.pt")
    return ["--ckpt", str(tmp_path / "bare.pt"), "--num-heads", "2", "--samples", "4", "--device", "cpu",
            "--vae", str(tiny_vae(tmp_path / "vae.pt")), "--cfg", "1.5"]


def test_a_file_that_does_not_say_that_it_holds_a_dit(bare_dit, tmp_path, capsys):
    """Filled weights load as asked; what was asked is a part of what the samples are."""
    path = tmp_path / "x.npz"

    def draw(*flags):
        program.main([*bare_dit, "--steps", "3", "--out", str(path), *flags])
        with np.load(path) as f:
            return f["arr_0"].astype(int), json.loads(str(f["settings"]))
    flow, settings = draw()
    assert settings["sampler"] == "sde" and not {"objective", "guided_channels"} & settings.keys()
    every, settings = draw("--objective", "ddpm")
    assert abs(every - flow).max() > 9 and (settings["objective"], settings["guided_channels"]) == ("ddpm", 4)
    three, settings = draw("--objective", "ddpm", "--guided-channels", "3")
    assert abs(every - three).max() > 0 and settings["guided_channels"] == 3
    capsys.readouterr()
    draw("--objective", "ddpm", "--guided-channels", "4")
    draw("--objective", "ddpm")
    assert capsys.readouterr().out.count("holds these 4 samples already") == 1


def test_published_dits_need_no_flag(bare_dit, tmp_path, monkeypatch):
    seen, sampler = [], dit.sample_ddpm
    monkeypatch.setattr(run, "checkpoint_file", lambda source, name: tmp_path / "bare.pt")
    monkeypatch.setattr(dit, "sample_ddpm", lambda *args, **kwargs: seen.append(kwargs) or
                        sampler(*args, **{**kwargs, "num_steps": 1}))
    for name in ("dit-xl-256", "dit-xl-512"):
        assert run.CHECKPOINTS[name] == f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{name[-3:]}x{name[-3:]}.pt"
        program.main([*bare_dit, "--ckpt", name, "--out", str(tmp_path / "x.png")])
    assert [call["num_steps"] for call in seen] == [250, 250]


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_contrastive_models_are_corrected_where_guidance_acts(sampler, checkpoints, tmp_path):
    """A checkpoint of contrastive flow matching holds its weight and the mean of its data."""
    content = torch.load(checkpoints["sit"], weights_only=True)
    torch.save({**content, "contrast": (0.05, torch.ones(1, 8, 8))}, tmp_path / "contrast.pt")

    def draw(path, *flags):
        out = tmp_path / "x.npz"
        program.main(["--ckpt", str(path), "--steps", "3", "--samples", "4", "--device", "cpu", "--sampler", sampler,
                      "--out", str(out), *flags])
        images = np.load(out)["arr_0"]
        out.unlink()
        return images
    for flags, alike in ((["--cfg", "1.5"], False), (["--cfg", "1"], True),
                         (["--cfg", "1.5", "--interval", "2", "3"], True)):
        assert np.array_equal(draw(checkpoints["sit"], *flags), draw(tmp_path / "contrast.pt", *flags)) == alike


def test_out_lies_beside_the_checkpoint(checkpoints, monkeypatch, tmp_path):
    program.main(["--ckpt", str(checkpoints["xar"]), "--samples", "2", "--steps", "1", "--device", "cpu"])
    assert (checkpoints["xar"].parent / "grid.png").exists()
    assert program.parse_args(["--ckpt", "xar-b"]).out == "out/grid.png"    # of fetched ones


def test_published_names_are_checkpoints(checkpoints, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "checkpoint_file", lambda source, name: checkpoints["xar"])
    program.main(["--ckpt", "xar-b", "--samples", "2", "--steps", "1", "--device", "cpu",
                  "--out", str(tmp_path / "x.png")])
    assert "x.png: 2 samples" in capsys.readouterr().out


def test_names_of_tensors_choose_the_model(tmp_path):
    torch.manual_seed(0)
    nets = {"sit": sit.SiT(8, 2, 1, 32, 2, 2, 10), "xar": xar.XAR(8, 1, 32, 1, 1, 2, 10, "cell:4")}
    arch = dict(grid=8, num_heads=2, entity="cell:4")
    for content in ({"ema": nets["sit"].state_dict()}, nets["sit"].state_dict()):
        torch.save(content, tmp_path / "x.pt")
        assert isinstance(models.load(tmp_path / "x.pt", 2), sit.SiT)
    for content in ({"ema": nets["xar"].state_dict(), "arch": arch},
                    {"model_ema": nets["xar"].state_dict(), "arch": arch}):
        torch.save(content, tmp_path / "x.pt")
        assert isinstance(models.load(tmp_path / "x.pt", None), xar.XAR)


# ---- tens of thousands: parts, and what survives

@LATENTS
def test_interrupted_sampling_resumes(draw, name, tmp_path, monkeypatch, capsys):
    flags = ["--samples", "9", "--batch-size", "2"]
    whole, to_uint8, drawn = draw(name, *flags, out="whole.npz"), program.to_uint8, []

    def interrupted(x, how):
        drawn.append(len(x))
        if len(drawn) == 3 and sum(drawn) == 6:
            raise KeyboardInterrupt
        return to_uint8(x, how)
    monkeypatch.setattr(program, "to_uint8", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(name, *flags)
    parts = tmp_path / "x.npz.parts"
    assert len(list(parts.glob("*.npy"))) == 2 and not (tmp_path / "x.npz").exists()
    with pytest.raises(SystemExit, match=r"x.npz.parts holds a part of other samples: cfg 2.0 \(was 1.5\). Give the"):
        draw(name, *flags, "--cfg", "2")
    (parts / "00000002_00000004.npy").write_bytes(b"damaged")               # drawn once more
    found = draw(name, "--samples", "9", "--batch-size", "3")
    assert sum(drawn) == 4 + 2 + 7 and abs(found["arr_0"].astype(int) - whole["arr_0"]).max() <= 1
    assert all(found[k].tolist() == whole[k].tolist() for k in ("arr_1", "settings"))
    before = sum(drawn)
    draw(name, *flags)
    assert sum(drawn) == before and "x.npz holds these 9 samples already: delete it" in capsys.readouterr().out
    parts.mkdir()                                                           # left by a kill while it was deleted
    draw(name, *flags)
    assert sum(drawn) == before and not parts.exists()
    parts.mkdir()
    np.save(parts / "00000000_00000002.npy", whole["arr_0"][:2])
    draw(name, *flags, "--seed", "1")                                       # another wish: it is replaced
    assert sum(drawn) == before + 9


def test_more_samples_later_keep_the_whole_parts(draw, tmp_path, monkeypatch):
    drawn, to_uint8 = [], program.to_uint8
    monkeypatch.setattr(program, "to_uint8", lambda x, how: (drawn.append(len(x)), to_uint8(x, how))[1])
    monkeypatch.setattr(program, "join", lambda *args: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        draw("sit", "--samples", "5", "--batch-size", "2")
    monkeypatch.undo()
    monkeypatch.setattr(program, "to_uint8", lambda x, how: (drawn.append(len(x)), to_uint8(x, how))[1])
    assert len(draw("sit", "--samples", "8", "--batch-size", "2")["arr_0"]) == 8
    assert drawn == [2, 2, 1, 2, 2]                                         # the half part at the end is drawn again


def test_parts_of_the_older_form_are_refused(draw, tmp_path):
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps({"cfg": 1.5, "weights": "abc"}))
    np.save(parts / "00000000.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(SystemExit, match="x.npz.parts was begun by an older version of this program: delete it") as e:
        draw("sit", "--samples", "4")
    assert "\n" not in str(e.value) and (parts / "00000000.npy").exists()


FULL = """
import resource, sys
sys.path.insert(0, {root!r})
import sample
import torch._dynamo                                                        # older torch writes files as it loads
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))              # no file may grow beyond: as on a full disk
sample.main({argv!r})
"""


@pytest.mark.slow
def test_full_disk_keeps_the_parts(checkpoints, tmp_path):
    command = ["--ckpt", str(checkpoints["sit_latents"]), "--steps", "1", "--samples", "6", "--batch-size", "2",
               "--device", "cpu", "--out", str(tmp_path / "x.npz")]
    code = FULL.format(limit=3000, root=str(ROOT), argv=command)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "x.npz could not be written (File too large)" in done.stderr and "the same command resumes" in done.stderr
    assert not (tmp_path / "x.npz").exists() and len(list((tmp_path / "x.npz.parts").glob("*.npy"))) == 3
    program.main(command)
    assert len(np.load(tmp_path / "x.npz")["arr_0"]) == 6


# ---- bad input

@LATENTS
def test_sampling_asks_for_the_right_decoder(draw, name, tmp_path, checkpoints):
    with pytest.raises(SystemExit, match="--vae nowhere.pt does not exist"):
        draw(name, "--vae", "nowhere.pt")
    with pytest.raises(SystemExit, match="is not the autoencoder that the training data was prepared with"):
        draw(name, "--vae", str(tiny_vae(tmp_path / "b.pt", 1)))
    content = torch.load(checkpoints[name], weights_only=True)
    bare = {k: v for k, v in content.items() if k in ("ema", "arch")}       # of others: it does not say
    torch.save(bare, tmp_path / "bare.pt")
    assert draw(name, "--ckpt", str(tmp_path / "bare.pt"), "--vae", str(tmp_path / "b.pt"), "--samples", "2")
    bare["ema"] = {k: w * np.nan if w.ndim == 2 else w for k, w in bare["ema"].items()}
    torch.save(bare, tmp_path / "nan.pt")
    with pytest.raises(SystemExit, match="samples are not finite"):
        draw(name, "--ckpt", str(tmp_path / "nan.pt"), "--vae", str(tmp_path / "b.pt"), out="nan.npz")
    assert not (tmp_path / "nan.npz").exists()


def test_bad_flags(checkpoints, tmp_path):
    content = torch.load(checkpoints["xar"], weights_only=True)
    torch.save({**content, "arch": {**content["arch"], "grid": 16}}, tmp_path / "other.pt")
    torch.save(sit.SiT(8, 2, 16, 384, 1, 6, 10).state_dict(), tmp_path / "latents.pt")
    torch.save({"ema": {}}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("this is not a checkpoint")
    cases = [
        ("sit", ["--ckpt", "none.pt"], "--ckpt none.pt does not exist .*or one of repa-xl"),
        ("sit", ["--samples", "0"], "--samples 0 must be 1"),
        ("sit", ["--out", "x.jpg"], "--out x.jpg must end in .png, .gif or .npz"),
        ("sit", ["--out", str(tmp_path / "text.pt" / "x.png")], "--out .*text.pt/x.png cannot be made"),
        ("sit", ["--cgf", "2"], "did you mean --cfg"),
        ("sit", ["--num", "2"], "--num is not a flag"),
        ("sit", ["--interval", "1", "0"], "--interval 1.0 0.0 must be low"),
        ("sit", ["--label", "10"], "--label 10 must lie in 0 ... 9"),
        ("sit", ["--num-heads", "4"], "ckpt.pt: has 2 attention heads, not 4"),
        ("sit", ["--ckpt", str(tmp_path / "latents.pt")], "--vae must name .* latents of 16 channels"),
        ("sit", ["--ckpt", str(tmp_path / "empty.pt")], "empty.pt: holds neither a SiT, nor an MM-DiT, nor an xAR"),
        ("sit", ["--ckpt", str(tmp_path / "text.pt")], "text.pt is not a readable checkpoint"),
        ("sit", ["--ckpt", str(tmp_path)], "is not a file"),
        ("xar", ["--sampler", "ode"], "--sampler ode is for SiT and MM-DiT, and .* holds an xAR: leave it out"),
        ("xar", ["--objective", "ddpm"], "--objective ddpm is for SiT and DiT, and .* holds an xAR: leave it out"),
        ("sit", ["--guided-channels", "3"], "--guided-channels 3 is for DiT, and .* holds a SiT: leave it out"),
        ("sit", ["--objective", "ddpm"], "ckpt.pt: was trained with --objective flow: give the same"),
        ("dit", ["--objective", "flow"], "ckpt.pt: was trained with --objective ddpm: give the same"),
        ("dit", ["--sampler", "ode"], "--sampler ode is for SiT and MM-DiT, and .* holds a DiT: leave it out"),
        ("dit", ["--interval", "0", "1"], r"--interval \[0.0, 1.0\] is for SiT and MM-DiT, and .* holds a DiT: leave it out"),
        ("dit", ["--path", "linear"], "--path linear is for SiT and MM-DiT, and .* holds a DiT: leave it out"),
        ("dit", ["--steps", "1001"], "--steps 1001 must be at most 1000"),
        ("dit", ["--guided-channels", "2", "--cfg", "2"],
         "--guided-channels 2 must be at most 1, the channels of .*ckpt.pt"),
        ("dit", ["--guided-channels", "1"], "--guided-channels 1 is for guidance: give --cfg, too"),
        ("dit", ["--guided-channels", "0"], "--guided-channels 0 must be 1 or more"),
        ("xar", ["--ckpt", str(tmp_path / "other.pt")], "other.pt: does not fit the model: .*size mismatch"),
    ]
    for name, flags, message in cases:
        with pytest.raises(SystemExit, match=message) as e:
            program.main(["--ckpt", str(checkpoints[name]), "--device", "cpu", "--out", str(tmp_path / "x.png"),
                          *flags])
        assert "\n" not in str(e.value) and str(e.value).startswith("sample.py: "), flags
    assert evaluate.image_grid(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), 2).size == ((2 * 9 - 1) * 8,) * 2
