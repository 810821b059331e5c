"""vae.py against the published autoencoders, in all three naming schemes and both file formats."""
import json
import re
import struct

import pytest
import torch
from conftest import Golden, distance
from fill import fill_state_dict

import vae

SIDES = {"vae_sd_diffusers": 8, "vae_kl16_ldm": 16}


def published(name):
    """Golden file, and its filled state dict under the published names."""
    g = Golden(name)
    return g, fill_state_dict({k: torch.zeros(s) for k, s in g.config["keys"].items()}, g.config["seed"])


@pytest.fixture(scope="module", params=SIDES)
def golden(request):
    return published(request.param)


def older(name):
    """diffusers' names -> those of files saved before May 2023."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(new, old)
    return name


def assert_golden(g, model):
    side, f = g.config["size"], model.factor
    with torch.no_grad():
        mean, std = model.encode(g.draw("image", 1, 3, side, side).tanh())
        decoded = model.decode(g.draw("latent", 1, model.z_channels, side // f, side // f))
    for found, name in ((mean, "mean"), (std, "std"), (decoded, "decoded")):
        assert distance(found, g[name]) < 1e-5


def test_golden_in_every_naming_scheme(golden):
    g, sd = golden
    model = vae.AutoencoderKL.from_state_dict(sd)
    assert_golden(g, model)
    assert model.factor == SIDES["vae_sd_diffusers" if model.z_channels == 4 else "vae_kl16_ldm"]
    assert model.scale == {4: 0.18215, 16: 0.2325}[model.z_channels]
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    again = vae.AutoencoderKL.from_state_dict(model.state_dict())           # LDM's names
    old = vae.AutoencoderKL.from_state_dict({older(k): w for k, w in sd.items()})
    wrapped = vae.AutoencoderKL.from_state_dict({"model": {**sd, "loss.logvar": torch.zeros(1)}, "epoch": 3})
    lightning = vae.AutoencoderKL.from_state_dict({"state_dict": {**sd, "loss.discriminator.weight": torch.zeros(1)}})
    for other in (again, old, wrapped, lightning):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert any("query" in older(k) for k in sd) == (model.z_channels == 4)


def test_files_of_both_formats(tmp_path, monkeypatch):
    g, sd = published("vae_sd_diffusers")
    torch.save({"state_dict": sd}, tmp_path / "vae.ckpt")
    body, header = b"", {"__metadata__": {"format": "pt"}}
    for k, w in sd.items():
        raw = w.half().numpy().tobytes()
        header[k] = {"dtype": "F16", "shape": list(w.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    whole = struct.pack("<Q", len(text)) + text + body
    (tmp_path / "vae.safetensors").write_bytes(whole)
    expected = vae.AutoencoderKL.from_state_dict(sd).state_dict()
    found = vae.load_vae(tmp_path / "vae.ckpt").state_dict()
    assert all(torch.equal(found[k], w) for k, w in expected.items())
    found = vae.load_vae(tmp_path / "vae.safetensors").state_dict()
    assert all(torch.equal(found[k], w.half().float()) for k, w in expected.items())

    (tmp_path / "cut.safetensors").write_bytes(whole[:-1000])
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "vae.ckpt").read_bytes()[:10_000])
    torch.save({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "other.ckpt")
    torch.save({k: w for k, w in sd.items() if k != "decoder.conv_out.bias"}, tmp_path / "less.ckpt")
    for name, message in (("cut.safetensors", "cannot be read: cut short"), ("cut.ckpt", "cannot be read: cut short"),
                          ("other.ckpt", "holds no KL autoencoder"), ("none.ckpt", "does not exist: give sd-ema"),
                          ("less.ckpt", "1 tensors are missing, .* among them decoder.conv_out.bias")):
        with pytest.raises((ValueError, OSError), match=f"{re.escape(name)} .*{message}") as e:
            vae.load_vae(tmp_path / name)
        assert "\n" not in str(e.value)

    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match="--vae sd-mse could not be fetched .no network.: download https://.*-ft-mse"):
        vae.load_vae("sd-mse")


def test_decoding_in_parts_and_odd_shapes(golden, monkeypatch):
    g, sd = golden
    model = vae.AutoencoderKL.from_state_dict(sd)
    z = torch.randn(3, model.z_channels, 1, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.decode(z)
        assert whole.shape == (3, 3, model.factor, 2 * model.factor)
        monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 1)
        assert torch.allclose(model.decode(z), whole, atol=1e-4)
        mean, std = model.encode(whole)
    assert mean.shape == std.shape == z.shape and std.min() > 0
    with pytest.raises(ValueError, match=f"33 x 32 do not fit .* multiples of {model.factor}"):
        model.encode(torch.zeros(1, 3, 32, 33))
