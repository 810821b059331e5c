"""text.py against OpenAI's tower, in both naming schemes and every kind of file, and against a plain BPE."""
import gzip
import html
import json
import pickle
import re
import struct
import unicodedata
import warnings
import zipfile
from collections import Counter

import pytest
import torch
from conftest import Golden, distance
from fill import fill_state_dict

import text

CAPTIONS = [
    "", "A cat on a mat.", "two cats, one dog & a hot-dog!!!", "It's the man's dog; they've gone, I'd say we'll see",
    "a sign that reads 2014", "Tom &amp;amp; Jerry &lt;3", "  tabs\tand\nlines  ", "snake_case a_b",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcber", "\u4e09\u53ea\u732b \u043a\u043e\u0442",
    "\U0001f408 cats \U0001f408\U0001f408", "20\u00b2m\u00b2 \u00bdx \u2163",
    "...'s 'tis o'clock's", "aaaa aaaaa banana bananas", "\u0e01\u0e33 \u0130stanbul e\u0301\u0323"]


# ---- BPE, written twice

def plain_words(caption):
    """The words of a caption, character by character, with Unicode's categories instead of a pattern."""
    caption = unicodedata.normalize("NFC", html.unescape(html.unescape(caption))).lower()
    words, i = [], 0

    def kind(c):
        return "space" if c.isspace() else {"L": "letter", "N": "number"}.get(unicodedata.category(c)[0], "other")
    while i < len(caption):
        contraction = next((c for c in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if caption.startswith(c, i)), "")
        j = i + max(1, len(contraction))
        if not contraction and kind(caption[i]) in ("letter", "other"):
            while j < len(caption) and kind(caption[j]) == kind(caption[i]):
                j += 1
        if not caption[i].isspace():
            words.append(caption[i:j])
        i = j
    return words


def byte_characters():
    """GPT-2's bytes_to_unicode, as published."""
    bs = [*range(ord("!"), ord("~") + 1), *range(0xa1, 0xac + 1), *range(0xae, 0xff + 1)]
    cs, n = bs[:], 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    return dict(zip(bs, map(chr, cs)))


def spelt(word):
    """A word as Sennrich's code has it: symbols with spaces between them."""
    return " ".join(byte_characters()[b] for b in word.encode()) + "</w>"


def joined(word, pair):
    pattern = r"(?<!\S)" + re.escape(" ".join(pair)) + r"(?!\S)"
    return re.sub(pattern, "".join(pair).replace("\\", r"\\"), word)


def pairs_of(word):
    symbols = word.split()
    return list(zip(symbols, symbols[1:]))


def learnt_merges(captions, count):
    """Sennrich's training: join the most frequent pair of the text, again and again."""
    vocabulary = Counter(spelt(word) for caption in captions for word in plain_words(caption))
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word, n in vocabulary.items():
            for pair in pairs_of(word):
                pairs[pair] += n
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        vocabulary = Counter({joined(word, merges[-1]): n for word, n in vocabulary.items()})
    return merges


def plain_ids(caption, merges):
    characters = list(byte_characters().values())
    ids = {s: i for i, s in enumerate([*characters, *[c + "</w>" for c in characters], *map("".join, merges)])}
    found = []
    for word in map(spelt, plain_words(caption)):
        while known := [merges.index(pair) for pair in pairs_of(word) if pair in merges]:
            word = joined(word, merges[min(known)])
        found += [ids[symbol] for symbol in word.split()]
    return found


def merges_file(path, merges):
    lines = "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n"
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.fixture(scope="module")
def merges():
    learnt = learnt_merges(CAPTIONS[:-1], 90)
    two_ways = [("a", "n"), ("b", "a"), ("ba", "n"), ("b", "an")]            # to one symbol
    return [*learnt, *[pair for pair in two_ways if pair not in learnt]]


@pytest.fixture
def tokenizer(tmp_path, merges):
    return text.Tokenizer(merges_file(tmp_path / "merges.txt", merges), length=24)


def test_bpe_is_that_of_a_plain_implementation(tokenizer, merges):
    assert max(len("".join(pair)) for pair in merges) > 7                   # merges of merges of merges
    start, end = 512 + len(merges), 513 + len(merges)
    ids = tokenizer(CAPTIONS)
    assert ids.shape == (len(CAPTIONS), 24) and ids.dtype == torch.int64 and tokenizer.vocabulary == end + 1
    cut = 0
    for caption, row in zip(CAPTIONS, ids.tolist()):
        expected = plain_ids(caption, merges)
        assert tokenizer.encode(caption) == expected, caption
        assert row == ([start, *expected[:22]] + [end] * 24)[:23] + [end], caption
        cut += len(expected) > 22
    assert tokenizer.cut == cut > 0
    assert tokenizer([]).shape == (0, 24)


def test_what_is_one_word(tokenizer):
    """Letters, digits one by one, contractions; capitals, space and escapes make no difference."""
    symbols = {i: s for s, i in tokenizer.ids.items()}

    def words(caption):
        joined_up = "".join(symbols[i] for i in tokenizer.encode(caption)).split("</w>")
        back = {c: b for b, c in byte_characters().items()}
        return [bytes(back[c] for c in word).decode() for word in joined_up[:-1]]
    for caption in CAPTIONS:                                                # ids can be read back
        assert words(caption) == plain_words(caption)
    assert words("In 2014 it's \u00bd_off!") == ["in", "2", "0", "1", "4", "it", "'s", "\u00bd", "_", "off", "!"]
    for a, b in (("A  Cat\n", "a cat"), ("a &amp;amp; b &gt;", "a & b >"), ("cafe\u0301", "caf\u00e9")):
        assert tokenizer.encode(a) == tokenizer.encode(b)
    assert tokenizer.encode("10") == [*tokenizer.encode("1"), *tokenizer.encode("0")]
    assert len(tokenizer.encode("\U0001f9ff")) == 4                         # no merge knows it: four bytes
    assert tokenizer.encode(json.loads('"a \\ud83d cat"')) == tokenizer.encode("a ? cat")  # half of a surrogate pair


def test_the_pattern_is_unicodes_letters_and_numbers(tokenizer):
    for code in range(0x3_0000):
        c = chr(code)
        category = unicodedata.category(c)
        if category == "Cs" or c.isspace():
            continue
        kind = category if category in ("Nl", "No") else category[0]        # the tokenizer sets those two apart
        alone, twice = (text.WORD.findall(s) for s in (c, c + c))
        assert alone == [c], hex(code)
        if kind not in ("Nl", "No"):
            assert twice == ([c, c] if kind == "N" else [c + c]), hex(code)
            assert bool(re.match(r"[^\W\d_]", c)) == (kind == "L"), hex(code)


def test_null_caption_padding_and_cut(tokenizer, merges):
    start, end = 512 + len(merges), 513 + len(merges)
    assert tokenizer([""]).tolist() == [[start] + [end] * 23] and tokenizer.cut == 0
    fits, long = tokenizer(["1" * 22, "1" * 23]).tolist()
    assert fits == long == [start] + tokenizer.encode("1") * 22 + [end] and tokenizer.cut == 1
    tokenizer(["1" * 99, "1"])
    assert tokenizer.cut == 2


def test_clips_vocabulary(tmp_path):
    """48,894 merges count, gzipped or not; the special tokens come last, as everybody knows them."""
    characters = text.SYMBOLS.values()
    assert text.SYMBOLS == byte_characters() and list(characters) == list(byte_characters().values())
    many = []
    for a in characters:
        many += [(a, b) for b in characters]
    plain = text.Tokenizer(merges_file(tmp_path / "merges.txt", many[:text.MERGES]))
    zipped = text.Tokenizer(merges_file(tmp_path / "bpe.txt.gz", many))
    assert len(many) > text.MERGES == 48_894
    for tokenizer in (plain, zipped):
        assert (tokenizer.vocabulary, tokenizer.start, tokenizer.end) == (49_408, 49_406, 49_407)
        assert tokenizer(["", "a"]).tolist() == [[49_406] + [49_407] * 76, [49_406, 320] + [49_407] * 75]
        assert tokenizer.encode("!") == [256] and tokenizer.ids["!"] == 0   # a</w> is 320 in CLIP, !</w> 256
    assert plain.ids == zipped.ids


def test_files_that_are_not_merges(tmp_path):
    path = tmp_path / "merges.txt"
    good = b"#version: 0.2\na b\nab c</w>\n"
    path.write_bytes(good.replace(b"\n", b"\r\n"))
    assert text.Tokenizer(path).vocabulary == 516
    for content in (b"", b"#version: 0.2\n", b"#version\na b c\n", b"#version\nred square\n", b"\x89PNG\r\n\xff\xfe",
                    json.dumps({"a": 1, "b</w>": 2}).encode(), gzip.compress(good)[:-9], gzip.compress(b"x" * 99),
                    b"#version\nthe 99\n", b"#version\na b\nc\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="--merges .*merges.txt is not a file of BPE merges") as e:
            text.Tokenizer(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 500
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match="--merges .* does not exist or is not a file"):
            text.Tokenizer(path)


# ---- CLIP's text tower

def official(dtype=torch.float32):
    """The golden file, and the whole CLIP that it was made with, in OpenAI's names."""
    g = Golden("clip")
    sd = fill_state_dict({k: torch.zeros(shape) for k, shape in g.config["keys"].items()}, g.config["seed"])
    return g, {k: w.to(dtype) for k, w in sd.items()}


def tower(sd):
    return {k: w for k, w in sd.items() if not k.startswith(("visual.", "logit_scale", "text_projection"))}


def hugging_face(sd):
    """The text tower's tensors of OpenAI under the names of transformers' CLIPTextModel."""
    names = {"ln_final": "final_layer_norm", "transformer.resblocks": "encoder.layers", "ln_": "layer_norm",
             "token_embedding": "embeddings.token_embedding", "attn.": "self_attn.", "c_fc": "fc1", "c_proj": "fc2",
             "positional_embedding": "embeddings.position_embedding.weight"}
    found = {}
    for k, w in tower(sd).items():
        for openai, hf in names.items():
            k = k.replace(openai, hf)
        if "in_proj_" in k:
            for x, part in zip("qkv", w.chunk(3)):
                found[f"text_model.{k.replace('in_proj_', f'{x}_proj.')}"] = part
        else:
            found[f"text_model.{k}"] = w
    return found


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(w, b[k]) for k, w in a.items())


@pytest.fixture(scope="module")
def golden():
    g, sd = official()
    return g, sd, text.clip_text_from_state_dict(sd)


def test_hidden_states_are_the_official_ones(golden):
    g, sd, net = golden
    hidden = net(g["ids"])
    assert hidden.shape == (2, 77, 128) and distance(hidden, g["text_hidden"]) < 1e-5
    assert net.blocks[0].attn.num_heads == 2 and all(
        m.eps == 1e-5 for m in net.modules() if isinstance(m, torch.nn.LayerNorm))
    assert not net.training and not any(p.requires_grad for p in net.parameters()) and not hidden.requires_grad
    # CLIP's own output: the state of the end token, projected
    pooled = hidden[torch.arange(2), g["ids"].argmax(dim=1)] @ sd["text_projection"]
    assert distance(pooled, g["text_pooled"]) < 1e-5


def test_both_sets_of_names(golden):
    g, sd, net = golden
    hf = hugging_face(sd)
    ids = torch.arange(77)[None]
    vision = {"vision_model.embeddings.position_embedding.weight": torch.zeros(5, 9),
              "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(9, 9),
              "vision_model.encoder.layers.7.mlp.fc1.weight": torch.zeros(9, 9),
              "visual_projection.weight": torch.zeros(4, 9), "text_projection.weight": torch.zeros(4, 128)}
    counts = {k: torch.tensor(n) for k, n in (("input_resolution", 56), ("context_length", 77), ("vocab_size", 300))}
    for other in (tower(sd), {**sd, **counts}, hf, {**hf, **vision}, net.state_dict(),
                  {**hf, "text_model.embeddings.position_ids": ids, "logit_scale": torch.tensor(1.0)},
                  {k.removeprefix("text_model."): w for k, w in hf.items()}):
        assert same(text.clip_text_from_state_dict(other), net)
    assert len(hf) == len(tower(sd)) + 3 * 4 and "text_model.encoder.layers.2.self_attn.v_proj.bias" in hf
    half = text.clip_text_from_state_dict({k: w.half() for k, w in sd.items()})
    assert half.ln_final.weight.dtype == torch.float32 and 0 < distance(half(g["ids"]), g["text_hidden"]) < 1e-2


def test_causal_and_shorter(golden):
    g, _, net = golden
    ids = g["ids"]
    whole = net(ids)
    for L in (1, 2, 9, 76):
        assert distance(net(ids[:, :L]), whole[:, :L]) < 1e-5
    other = ids.clone()
    other[:, 5:] = 7
    assert distance(net(other)[:, :5], whole[:, :5]) < 1e-5 and distance(net(other)[:, 5:], whole[:, 5:]) > 0.1
    assert net(ids[:0]).shape == (0, 77, 128)


def test_quick_gelu_heads_and_positions_matter(golden, monkeypatch):
    g, sd, net = golden
    assert distance(text.clip_text_from_state_dict(sd, num_heads=4)(g["ids"]), g["text_hidden"]) > 1e-3
    moved = {**sd, "positional_embedding": sd["positional_embedding"].roll(1, 0)}
    assert distance(text.clip_text_from_state_dict(moved)(g["ids"]), g["text_hidden"]) > 1e-2
    monkeypatch.setattr(text.Mlp, "forward", lambda self, x: self.c_proj(torch.nn.functional.gelu(self.c_fc(x))))
    assert distance(net(g["ids"]), g["text_hidden"]) > 1e-3


def test_ids_that_do_not_fit(golden):
    _, _, net = golden
    for ids, message in ((torch.zeros(1, 78, dtype=torch.int64), "captions of 78 ids are longer than the encoder's 77"),
                         (torch.tensor([[0, 300]]), "ids from 0 to 300 do not fit the encoder's vocabulary of 300"),
                         (torch.tensor([[-1, 3]]), "ids from -1 to 3 do not fit")):
        with pytest.raises(ValueError, match=message):
            net(ids)
    with torch.device("meta"):                                              # whose ids nobody can look at
        big = text.ClipText(49_408, 77, 768, 12, 12)
        assert big(torch.zeros(2, 9, dtype=torch.int64)).shape == (2, 9, 768)
    assert sum(p.numel() for p in big.parameters()) == 123_060_480          # ViT-L/14's
    with pytest.raises(ValueError, match="width 128 must be a multiple of the number of heads 3"):
        text.ClipText(300, 77, 128, 1, 3)


# ---- files

def safetensors(sd):
    body, header = b"", {"__metadata__": {"format": "pt"}}
    for k, w in sd.items():
        raw = w.contiguous().view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}[w.dtype]
        header[k] = {"dtype": dtype, "shape": list(w.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def scripted(sd):
    """A TorchScript module with the tensors of a state dict, and all that such a file may hold besides."""
    top = torch.nn.Module()
    for name, w in sd.items():
        *path, leaf = name.split(".")
        module = top
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(w, requires_grad=False))
    top.transformer.resblocks._modules["0"].attn_mask = torch.zeros(77, 77)  # OpenAI's is not a buffer
    top.visual.conv = torch.nn.Conv2d(3, 4, 2).half()                       # has a list of integers
    top.visual.mha = torch.nn.MultiheadAttention(4, 2).half()
    top.register_buffer("context_length", torch.tensor(77))
    top.register_buffer("view", torch.arange(12).view(3, 4).T[1:])
    top.register_buffer("empty", torch.zeros(0, 3))
    top.sizes = {"grid": 4}
    top.nothing = None
    return torch.jit.script(top)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """CLIP's file as OpenAI made it: a TorchScript archive in half precision."""
    path = tmp_path_factory.mktemp("archive") / "ViT-L-14.pt"
    with warnings.catch_warnings(action="ignore"):                          # torch.jit is deprecated
        torch.jit.save(scripted(official(torch.float16)[1]), path)
    return path


def test_every_kind_of_file(tmp_path, archive):
    _, sd = official(torch.float16)
    expected = text.clip_text_from_state_dict(sd)
    (tmp_path / "whole.safetensors").write_bytes(safetensors(sd))
    hf = hugging_face(sd)
    ids = {"text_model.embeddings.position_ids": torch.arange(77)}
    (tmp_path / "hf.safetensors").write_bytes(safetensors({**hf, **ids}))
    torch.save(hf, tmp_path / "hf.bin")
    torch.save(hf, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    for path in (*sorted(tmp_path.iterdir()), archive):
        net = text.load_clip_text(path)
        assert same(net, expected) and not net.training and net.ln_final.weight.dtype == torch.float32, path
    bf16 = {k: w.bfloat16() for k, w in sd.items()}
    (tmp_path / "bf16.safetensors").write_bytes(safetensors(bf16))
    assert same(text.load_clip_text(tmp_path / "bf16.safetensors"), text.clip_text_from_state_dict(bf16))


def test_an_archive_without_deprecated_functions(archive, recwarn, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", None)
    tensors = text.read_torchscript(archive)
    assert not recwarn.list
    assert all(torch.equal(tensors[k], w) for k, w in official(torch.float16)[1].items())
    assert "transformer.resblocks.0.attn_mask" in tensors and tensors["context_length"] == 77
    assert tensors["view"].tolist() == [[1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert tensors["visual.mha.in_proj_weight"].shape == (12, 4) and tensors["empty"].shape == (0, 3)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def with_pickle(archive, path, raw):
    """A copy of an archive with another data.pkl."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, raw if name.endswith("/data.pkl") else old.read(name))
    return path


def test_nothing_in_an_archive_is_run(tmp_path, archive):
    """Neither what a pickle calls, nor code of TorchScript's own."""
    written = tmp_path / "written"
    evil = pickle.dumps(Evil(written), protocol=2)
    hidden = b"\x80\x02}(X\x01\x00\x00\x00a" + evil[2:-1] + b"u."               # as a value of a dict
    shell = f"cos\nsystem\n(S'touch {written}'\ntR.".encode()
    for raw in (evil, hidden, shell, pickle.dumps(Evil(written), protocol=4), b"ctorch\nload\n)R.",
                b"c__builtin__\neval\n.", b"ctorch._utils\n_rebuild_parameter\n."):
        path = with_pickle(archive, tmp_path / "evil.pt", raw)
        with pytest.raises(pickle.UnpicklingError, match="is not part of a network"):
            text.read_torchscript(path)
        with pytest.raises(ValueError, match=r"--text .*evil.pt cannot be read: .* \(UnpicklingError\)"):
            text.load_clip_text(path)
    torch.save({"a": Evil(written)}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="evil.bin cannot be read"):
        text.load_clip_text(tmp_path / "evil.bin")
    assert not written.exists()
    # other bytes than a network's: outside of its storage, and round in a circle
    storage = b"(X\x07\x00\x00\x00storagectorch\nHalfStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    outside = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(J\xff\xff\xff\x00t(K\x01t\x89NtR."
    circle = b"\x80\x02c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    number = b"\x80\x02K\x01."
    for raw, kind in ((outside, "RuntimeError"), (circle, "RecursionError"), (b"", "EOFError"), (number, "TypeError")):
        with pytest.raises(ValueError, match=rf"cannot be read: .* \({kind}\)"):
            text.load_clip_text(with_pickle(archive, tmp_path / "odd.pt", raw))


def test_files_that_are_not_clips(tmp_path, archive):
    _, sd = official()
    torch.save(sd, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:10_000])
    (tmp_path / "archive.pt").write_bytes(archive.read_bytes()[:-1000])
    (tmp_path / "cut.safetensors").write_bytes(safetensors(sd)[:-1000])
    (tmp_path / "other.safetensors").write_bytes(b"\xff" * 99)
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.pt", "archive.pt", "cut.safetensors", "other.safetensors", "empty.pt"):
        with pytest.raises(ValueError, match=f"--text .*{name} cannot be read: cut short, or of another format") as e:
            text.load_clip_text(tmp_path / name)
        assert "\n" not in str(e.value)
    less = {k: w for k, w in sd.items() if k != "transformer.resblocks.1.ln_1.bias"}
    for content, message in (
            ([1], "AttributeError"), ({1: sd}, "AttributeError"), ({}, "KeyError: 'token_embedding.weight'"),
            (less, r"Missing key.* .blocks.1.ln_1.bias"),
            ({**sd, "ln_final.more.bias": torch.zeros(3)}, "Unexpected key.* .ln_final.more.bias"),
            ({k: w for k, w in sd.items() if k.startswith("visual.")}, "KeyError"),
            ({**sd, "ln_final.bias": torch.zeros(3)}, "size mismatch for ln_final.bias"),
            ({**sd, "ln_final.bias": 1}, "AttributeError")):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=f"--text .*w.pt: not a text tower of CLIP .*{message}") as e:
            text.load_clip_text(tmp_path / "w.pt")
        assert "\n" not in str(e.value) and len(str(e.value)) < 500
    with pytest.raises(ValueError, match="width 128 must be a multiple of the number of heads 5"):
        text.clip_text_from_state_dict(sd, num_heads=5)
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="--text .* does not exist or is not a file"):
            text.load_clip_text(path)


# ---- a language of a few words

WORDS = ["a", "red", "blue", "square", "left", "of"]


def test_word_tokenizer():
    tokenizer = text.WordTokenizer(WORDS, 6)
    assert tokenizer(["a Red square", "", "a blue square left of a"]).tolist() == [
        [1, 2, 4, 0, 0, 0], [0] * 6, [1, 3, 4, 5, 6, 1]]
    assert tokenizer([]).shape == (0, 6) and tokenizer([""]).dtype == torch.int64
    for caption, message in (("a green\nsquare", "'a green.*' has the unknown word 'green': the words are a, red, blu"),
                             ("a a a a a a a", "has 7 words, but at most 6 can be read")):
        with pytest.raises(ValueError, match=message) as e:
            tokenizer(["a", caption])
        assert "\n" not in str(e.value)


def test_word_codes():
    a, b = text.WordCodes(6, 8, 64), text.WordCodes(6, 8, 64)
    ids = torch.tensor([[1, 2, 1, 0, 0, 6, 3, 1]])
    codes = a(ids)
    assert codes.shape == (1, 8, 64) and codes.dtype == torch.float32 and torch.equal(codes, b(ids))
    assert not torch.equal(codes, text.WordCodes(6, 8, 64, seed=1)(ids))
    assert not torch.allclose(codes[0, 0], codes[0, 2]) and not torch.allclose(codes[0, 3], codes[0, 4])
    assert torch.equal(a(ids[:, :3]), codes[:, :3])
    assert not list(a.parameters()) and not a.state_dict() and not codes.requires_grad
    assert abs(a.codes.std() - 1) < 0.1
    table = a(torch.arange(7)[:, None])[:, 0]                               # words are told apart
    assert torch.cdist(table, table).add(torch.eye(7) * 99).min() > 5
    assert torch.allclose(a.codes[0, :4], torch.tensor([1.7640524, 0.4001572, 0.978738, 2.2408931]))  # for ever
    angles = torch.tensor([1, 10_000 ** (-31 / 32)])                        # of place 1: the fastest and the slowest
    assert torch.allclose(a.places[1, [0, 31, 32, 63]], torch.cat([angles.sin(), angles.cos()]))
    for ids, message in ((torch.zeros(1, 9, dtype=torch.int64), "9 ids are longer than the encoder's 8"),
                         (torch.tensor([[7]]), "vocabulary of 7")):
        with pytest.raises(ValueError, match=message):
            a(ids)


# ---- what about_text says

def test_fingerprint(golden):
    _, sd, net = golden
    mark = text.fingerprint(net)
    assert re.fullmatch("[0-9a-f]{16}", mark)
    half = {k: w.half() for k, w in sd.items()}
    other = {**sd, "ln_final.bias": sd["ln_final.bias"] + 0.01}
    for weights, equal in ((hugging_face(sd), True), (half, True), (other, False)):
        assert (text.fingerprint(text.clip_text_from_state_dict(weights)) == mark) == equal
    assert text.fingerprint(text.WordCodes(6, 8, 64)) != text.fingerprint(text.WordCodes(6, 8, 64, seed=1))


def test_words_as_described():
    about = {"encoder": "words", "words": WORDS, "length": 6, "width": 16}
    ids = text.open_tokenizer(about)(["a red square"])
    assert text.open_encoder(json.loads(json.dumps(about)))(ids).shape == (1, 6, 16)
    for about in ({"encoder": "t5"}, {}):
        for function in (text.open_tokenizer, text.open_encoder):
            with pytest.raises(ValueError, match="text encoder .* is neither words nor clip"):
                function(about)


def test_clip_as_described(tmp_path, golden, merges):
    g, sd, net = golden
    torch.save(sd, tmp_path / "clip.pt")
    torch.save({**sd, "positional_embedding": 2 * sd["positional_embedding"]}, tmp_path / "other.pt")
    about = json.loads(json.dumps({**text.describe(net), "features": False}))
    assert about == {"encoder": "clip", "length": 77, "width": 128, "vocabulary": 300,
                     "fingerprint": text.fingerprint(net), "features": False}
    for known in (about, {"encoder": "clip"}):
        assert same(text.open_encoder(known, tmp_path / "clip.pt"), net)
    with pytest.raises(ValueError, match="--text .*other.pt is not the text encoder that the training data") as e:
        text.open_encoder(about, tmp_path / "other.pt")
    assert "\n" not in str(e.value)
    path = merges_file(tmp_path / "bpe.txt.gz", merges)
    size = 514 + len(merges)
    assert text.open_tokenizer({**about, "vocabulary": size, "length": 9}, path)(["a"]).shape == (1, 9)
    assert text.open_tokenizer({"encoder": "clip"}, path)(["a"]).shape == (1, 77)
    with pytest.raises(ValueError, match=f"--merges .*bpe.txt.gz makes a vocabulary of {size}, but .* has 300") as e:
        text.open_tokenizer(about, path)
    assert "\n" not in str(e.value)


def test_files_are_fetched_once(tmp_path, golden, merges, monkeypatch):
    _, sd, net = golden
    asked = []

    def download(url, path, sha256):
        asked.append(url)
        assert sha256 == {"ViT-L-14.pt": url.split("/")[-2]}.get(url.split("/")[-1])
        if url.endswith(".gz"):
            merges_file(tmp_path / "checkpoints" / "bpe_simple_vocab_16e6.txt.gz", merges)
        else:
            torch.save(sd, path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert same(text.open_encoder({"encoder": "clip"}), net)
        assert text.open_tokenizer({"encoder": "clip"})([""]).shape == (1, 77)
    assert asked == [
        "https://openaipublic.azureedge.net/clip/models/"
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"]

    def offline(url, path, sha256):
        raise OSError("no\nroute")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for function, url, flag in ((text.open_encoder, asked[0], "--text"), (text.open_tokenizer, asked[1], "--merges")):
        with pytest.raises(OSError, match=f"could not be fetched .no route.: download {url} and name .* {flag}$") as e:
            function({"encoder": "clip"})
        assert "\n" not in str(e.value)
