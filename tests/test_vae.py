"""vae.py against the published autoencoders, in all three naming schemes and both file formats."""
import json
import re
import struct

import pytest
import torch
from conftest import Golden, distance, tiny_vae
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
    sd = fill_state_dict(vae.AutoencoderKL((1, 1), 4).state_dict())         # small: the files are written in seconds
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
    torch.save({**sd, "encoder.more": torch.zeros(1)}, tmp_path / "more.ckpt")
    torch.save({**sd, "decoder.conv_in.bias": torch.zeros(3)}, tmp_path / "shape.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.ckpt")
    for name, message in (("cut.safetensors", "cannot be read: cut short"), ("cut.ckpt", "cannot be read: cut short"),
                          ("other.ckpt", "is not a KL autoencoder .*post_quant_conv.weight"),
                          ("none.ckpt", "does not exist: give sd-ema"),
                          ("less.ckpt", "is not a KL .* Missing key.* .decoder.conv_out.bias"),
                          ("more.ckpt", "is not a KL .* Unexpected key.* .encoder.more"),
                          ("shape.ckpt", "is not a KL .* size mismatch for decoder.conv_in.bias"),
                          ("list.ckpt", "is not a KL"), ("numbers.ckpt", "is not a KL")):
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


# ---- which autoencoder made the latents

def test_fingerprint_is_of_the_encoder_alone(tmp_path):
    net = vae.load_vae(tiny_vae(tmp_path / "a.pt"))
    assert vae.fingerprint(net) == "b4a501d5e90d3883"                       # as packed folders and checkpoints have it
    net.decoder.conv_out.bias += 1
    assert vae.fingerprint(net) == "b4a501d5e90d3883"
    net.quant_conv.bias[0] += 1
    assert vae.fingerprint(net) != "b4a501d5e90d3883"


def test_decoder_is_that_of_the_training_data(tmp_path):
    assert vae.load_decoder(None, None, 3, "cpu")("as it is") == "as it is"
    with pytest.raises(ValueError, match="--vae must name the autoencoder's file, for latents of 16 channels"):
        vae.load_decoder(None, None, 16, "cpu")
    a, b = (str(tiny_vae(tmp_path / f"{seed}.pt", seed)) for seed in (0, 1))
    net, z = vae.load_vae(a), torch.randn(2, 4, 3, 3)
    known = {"vae": a, "fingerprint": vae.fingerprint(net)}
    for packed_from, source in ((known, None), (known, a), (None, a), ({**known, "vae": b}, a)):
        pixels = vae.load_decoder(packed_from, source, 4, torch.device("cpu"))(net.scale * z)
        assert torch.allclose(pixels, net.decode(z), atol=1e-4) and not pixels.requires_grad
    with torch.autocast("cpu", torch.bfloat16):                             # of the training program
        assert vae.load_decoder(known, None, 4, "cpu")(z.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="1.pt is not the autoencoder that the training data was prepared with .*0.pt"):
        vae.load_decoder(known, b, 4, "cpu")
    with pytest.raises(ValueError, match="latents of 4 channels, but the model's have 16: name"):
        vae.load_decoder(None, a, 16, "cpu")
    with pytest.raises(FileNotFoundError, match="--vae nowhere.pt does not exist"):
        vae.load_decoder(known, "nowhere.pt", 4, "cpu")
