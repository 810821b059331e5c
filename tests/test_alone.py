"""Each file of the ground floor works alone in an empty folder; README and docs do what they say."""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

ALONE = {
    "haste.py": """
import torch, haste
q, k = torch.randn(2, 2, 4, 16, 8, requires_grad=True)
q_t, k_t = torch.randn(2, 2, 6, 16, 12)
loss = haste.attention_alignment(q, k, q_t, k_t)
cheap = haste.attention_alignment_grad(q, k, q_t, k_t)
for a, b in zip(torch.autograd.grad(loss, (q, k)), torch.autograd.grad(cheap, (q, k))):
    assert torch.allclose(a, b, atol=1e-6)
assert haste.feature_alignment(q, q) == -1
assert haste.layer_map("SiT-XL") == (8, [(4, 8), (5, 9), (6, 10), (7, 11)])
w = torch.ones(3, requires_grad=True)
assert torch.allclose(haste.gradient_cosine(lambda t: (w.sum(), -2 * w.sum()), [w]), torch.tensor(-1.0))
""",
    "sit.py": """
import torch, sit
model = sit.SiT(8, 2, 4, 32, 2, 2, 10, z_dim=6, projector_dim=8, encoder_depth=1)
x, y = torch.randn(2, 4, 8, 8), torch.arange(2)
v, z, taps = model(x, torch.rand(2), y, tap_layers=(1,))
sit.flow_loss(model, x, y, label_drop=0.1).backward()
for sample in (sit.sample_ode, sit.sample_sde):
    assert sample(model, x, y, num_steps=3, cfg_scale=1.5).shape == x.shape
torch.save(model.state_dict(), "w.pt")
assert sit.load_sit("w.pt", num_heads=2)(x, torch.rand(2), y).shape == x.shape
""",
    "dit.py": """
import torch, dit
model = lambda x, t, y: torch.cat([x, torch.zeros_like(x)], dim=1)
x, y = torch.randn(2, 4, 8, 8, requires_grad=True), torch.arange(2)
dit.ddpm_loss(model, x, y).backward()
settings = dict(cfg_scale=1.5, null_label=10, guided_channels=3)
assert dit.sample_ddpm(model, x.detach(), y, num_steps=3, **settings).shape == x.shape
""",
    "mmdit.py": """
import torch, mmdit
model = mmdit.MMDiT(8, 2, 4, 32, 2, 2, context_dim=12, z_dim=6, projector_dim=8, encoder_depth=1)
x, t, context = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 3, 12)
v, z, taps = model(x, t, context, tap_layers=(1,))
assert v.shape == x.shape and z.shape == (2, 16, 6) and taps[0][0].shape == (2, 2, 16, 16)
torch.save(model.state_dict(), "w.pt")
assert torch.equal(mmdit.load_mmdit("w.pt")(x, t, context), v)
""",
    "xar.py": """
import torch, xar
model = xar.XAR(8, 1, 32, 1, 1, 2, 10, "cell:4")
x, y = torch.randn(2, 1, 8, 8), torch.arange(2)
assert model(model.to_tokens(x), torch.rand(2, 4), y).shape == (2, 64, 1)
model.loss(x, y, label_drop=0.1, context="clean").backward()
assert model.sample(y, num_steps=3, cfg_scale=1.5).shape == x.shape
torch.save({"ema": model.state_dict(), "arch": dict(grid=8, num_heads=2, entity="cell:4")}, "w.pt")
assert xar.load_xar("w.pt").sample(1, 2).shape == (1, 1, 8, 8)
""",
    "teacher.py": """
import torch, teacher
images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
net = teacher.train_small(images, torch.arange(40) % 4, steps=2, embed_dim=16, batch_size=16)
tokens, taps = net(teacher.preprocess(images, 4), tap_layers=(1,))
assert tokens.shape == (40, 16, 16) and taps[0][0].shape == (40, 4, 16, 4)
net = teacher.DINOv2(embed_dim=16, depth=2, num_heads=2).resize_pos_embed(2)
assert net.features(teacher.preprocess(images[:2], 2))[0].shape == (2, 16)
net = teacher.ViT(32, 16, 16, 2, 2, family="mae")
net = teacher.teacher_from_state_dict("mae", net.state_dict(), num_heads=2).resize_pos_embed((1, 3))
assert net(net.preprocess(images[:2], (1, 3)), [1])[0].shape == (2, 3, 16)
""",
    "vae.py": """
import torch, vae
model = vae.AutoencoderKL((1, 1), 4).eval()
x = torch.randn(1, 3, 8, 8)
mean, std = model.encode(x)
assert mean.shape == std.shape == (1, 4, 4, 4) and model.decode(mean).shape == x.shape
torch.save(model.state_dict(), "w.pt")
assert torch.allclose(vae.load_vae("w.pt").decode(mean), model.decode(mean), atol=1e-5)
""",
    "text.py": """
import torch, text
open("merges.txt", "w").write("#version: 0.2\\nc a\\nca t</w>\\n")
tokenizer = text.Tokenizer("merges.txt", length=8)
net = text.ClipText(tokenizer.vocabulary, 8, 32, 2, 2)
torch.save(net.state_dict(), "w.pt")
ids = tokenizer(["A cat", ""])
assert ids[0].tolist() == [514, 320, 513, 515, 515, 515, 515, 515] and tokenizer.cut == 0
assert text.load_clip_text("w.pt")(ids).shape == (2, 8, 32)
about = dict(encoder="words", words=["red", "square"], length=3, width=4)
assert text.open_encoder(about)(text.open_tokenizer(about)(["red square", ""])).shape == (2, 3, 4)
""",
    "fid.py": """
import torch, fid
images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
found = fid.extract(images, fid.Inception(), batch_size=2, keep=("pool", "logits"))
assert found.gaussians["pool"][0].shape == (2048,) and found.gaussians["spatial"][0].shape == (2023,)
assert fid.frechet_distance(*found.gaussians["pool"], *found.gaussians["pool"]) == 0
assert fid.inception_score(found.kept["logits"]) >= 1
assert fid.precision_recall(found.kept["pool"], found.kept["pool"]) == (1, 1)
assert len(fid.kid(found.kept["pool"], found.kept["pool"], subset_size=4)) == 2
""",
}


def run_python(code, folder):
    """Run code in a folder with nothing but that folder on the path; return what went wrong, or nothing."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    return "" if done.returncode == 0 else code + done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """{file: what went wrong with it}: each in a folder of its own, two at a time."""
    def call(name):
        folder = tmp_path_factory.mktemp(name.replace(".", "_"))
        shutil.copy(ROOT / name, folder)
        return run_python(ALONE[name], folder)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ALONE, pool.map(call, ALONE)))


@pytest.mark.parametrize("name", ALONE)
def test_file_alone_in_an_empty_folder(name, alone):
    assert not alone[name], alone[name]


# ---- README and docs

SHORT = "--steps 20"                                                        # the README names it as the quick look
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language, pages=PAGES):
    found = []
    for page in pages:
        found += re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)
    return found


def test_first_block_runs_the_main_job_and_second_the_tests():
    first, second = blocks("bash", PAGES[:1])[:2]
    assert first.strip().count("\n") == 0 and second.strip().count("\n") == 0
    assert first.strip().endswith("pip install -r requirements.txt && python haste_train.py")
    assert second.strip().endswith("&& python -m pytest")
    command = second.strip().replace("pip install ", "pip install -q ")
    assert command in (ROOT / ".ci" / "run").read_text()                    # .ci/run is the installation's test
    assert SHORT in PAGES[0].read_text()


def commands():
    """Return every `python ...` line of the bash blocks, but not the installation and the tests."""
    lines = []
    for block in blocks("bash"):
        lines += [line.split("&&")[-1].split(" #")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ") and "pytest" not in line]


def fresh_copy(folder):
    for file in [*ROOT.glob("*.py"), ROOT / "digits.npz"]:
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "tools", folder / "tools")


@pytest.mark.slow
def test_commands_run(tmp_path):
    """As they stand, but for fewer steps, also of their teachers, and fewer samples."""
    fresh_copy(tmp_path)
    assert len(commands()) >= 8
    for command in commands():
        args = shlex.split(command)[1:]
        if args[0] in ("haste_train.py", "xar_train.py") and "--help" not in args:
            args += [*shlex.split(SHORT), "--eval-samples", "20", "--eval-steps", "4", "--teacher-steps", "20"]
        if args[0] == "sample.py":
            args += ["--samples", "4", "--steps", "4"]
        done = subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, command + "\n" + done.stdout + done.stderr
    for picture in ("samples.png", "curves.png", "grid.png", "teacher.png", "xar/growth.png"):
        assert (tmp_path / "out" / picture).exists(), picture


def test_python_blocks_run(tmp_path):
    fresh_copy(tmp_path)
    assert len(blocks("python")) >= 3
    with ThreadPoolExecutor(2) as pool:
        assert not any(pool.map(lambda code: run_python(code, tmp_path), blocks("python")))


PROGRAMS = ["haste_train", "xar_train", "sample", "prepare", "fid"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_help(program, capsys):
    with pytest.raises(SystemExit) as e:
        importlib.import_module(program).main(["--help"])
    assert e.value.code == 0 and f"usage: {program}.py" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("program", [f"{name}.py" for name in PROGRAMS])
def test_every_program_is_one(program):
    done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and program in done.stdout and "--device" in done.stdout
