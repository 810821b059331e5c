"""Captions as numbers: CLIP's tokenizer and text tower, and fixed codes for a language of a few
words. A tokenizer gives ids, a frozen encoder the features that a text-to-image model reads.

    net = load_clip_text("ViT-L-14.pt")                   # or any file in Hugging Face's names
    tokenizer = Tokenizer("bpe_simple_vocab_16e6.txt.gz")
    ids = tokenizer(["a cat on a mat", ""])               # [2,77]; "" is the null caption
    features = net(ids)                                   # [2,77,768]

The tower equals OpenAI's to 1e-5, from three kinds of files and in two naming schemes
(tests/test_text.py).

Papers: CLIP, "Learning Transferable Visual Models From Natural Language Supervision" (Radford et
al. 2021, arXiv 2103.00020); byte-pair encoding (Sennrich et al. 2016, 1508.07909).

Letters: B batch, L ids of a caption, D width, H heads.
"""
import gzip
import hashlib
import html
import json
import pickle
import re
import struct
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

CLIP_SHA256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
CLIP_URL = f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-L-14.pt"
MERGES_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"

LENGTH = 77             # of every published CLIP
MERGES = 48_894         # that CLIP uses; OpenAI's file has more
HEAD_WIDTH = 64


# ---- tokenizers

# bytes that print stand for themselves and come first, as in GPT-2
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SYMBOLS = {byte: chr(byte) for byte in PRINTABLE}
SYMBOLS |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
ALPHABET = list(SYMBOLS.values())
ALPHABET += [symbol + "</w>" for symbol in ALPHABET]        # at the end of a word

# contractions, letters, one digit, anything else but space: \p{L} and \p{N} in terms of re
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")


class Tokenizer:
    """CLIP's byte-level BPE, from OpenAI's bpe_simple_vocab_16e6.txt.gz or a plain merges.txt.

    `tokenizer(captions)` returns ids int64 [B,length]: the start token, the caption, and end tokens
    as padding, which is Hugging Face's choice (OpenAI pads with 0). Captions that are too long lose
    their end; `cut` counts them. `vocabulary` is the number of ids.
    """

    def __init__(self, path, length=LENGTH):
        merges = read_merges(path)
        symbols = [*ALPHABET, *map("".join, merges)]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.start = len(symbols)
        self.end = self.start + 1
        self.vocabulary = self.start + 2
        self.length = length
        self.cut = 0
        self.cache = {}                                     # word: its ids

    def __call__(self, captions):
        room = self.length - 2
        rows = []
        for caption in captions:
            ids = self.encode(caption)
            self.cut += len(ids) > room
            padding = [self.end] * (room - len(ids))
            rows.append([self.start, *ids[:room], self.end, *padding])
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.length)

    def encode(self, caption):
        """Return the list of a caption's ids, without start and end."""
        text = html.unescape(html.unescape(caption))        # web pages have escaped some twice
        text = unicodedata.normalize("NFC", text).lower()
        for c in set(text):
            if unicodedata.category(c) in ("Nl", "No"):     # re counts such numerals as letters
                text = text.replace(c, f" {c} ")
        ids = []
        for word in WORD.findall(text):
            if word not in self.cache:
                self.cache[word] = [self.ids[symbol] for symbol in self.merge(word)]
            ids += self.cache[word]
        return ids

    def merge(self, word):
        """Return the symbols of a word: its bytes, merged pair by pair in the order of the file."""
        # JSON may hold half of a surrogate pair, which has no bytes: it becomes a question mark
        parts = [SYMBOLS[byte] for byte in word.encode(errors="replace")]
        parts[-1] += "</w>"
        while True:
            known = [pair for pair in zip(parts, parts[1:]) if pair in self.ranks]
            if not known:
                return parts
            best = min(known, key=self.ranks.get)
            merged = parts[:1]
            for part in parts[1:]:
                if (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged


def read_merges(path):
    """Return [(left, right), ...] of a file of merges, gzipped or not.

    Raises ValueError or OSError, one line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--merges {path} does not exist or is not a file")
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
        lines = raw.decode().split("\n")[1:1 + MERGES]      # after a line that names the version
        merges = [(left, right) for left, right in map(str.split, filter(str.strip, lines))]
        symbols = {*ALPHABET, *map("".join, merges)}
        if not merges or not all(map(symbols.issuperset, merges)):
            raise ValueError("it has none, or some join symbols that do not exist")
    except Exception as e:
        why = " ".join(str(e).split())[:200]
        raise ValueError(f"--merges {path} is not a file of BPE merges ({why})") from None
    return merges


class WordTokenizer:
    """A small language: `words` have ids 1, 2, ..., in their order, and 0 is the padding.

    `tokenizer(captions)` returns ids int64 [B,length]; it raises ValueError, one line.
    """

    def __init__(self, words, length):
        self.ids = {word: i for i, word in enumerate(words, 1)}
        self.length = length
        self.cut = 0                                        # none: what is too long is refused

    def __call__(self, captions):
        ids = torch.zeros(len(captions), self.length, dtype=torch.int64)
        for row, caption in zip(ids, captions):
            words = caption.lower().split()
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                raise ValueError(f"caption {caption!r:.200} has the unknown word "
                                 f"{unknown[0]!r:.50}: the words are {', '.join(self.ids)}")
            if len(words) > self.length:
                raise ValueError(f"caption {caption!r:.200} has {len(words)} words, but at most "
                                 f"{self.length} can be read")
            row[:len(words)] = torch.tensor([self.ids[word] for word in words])
        return ids


# ---- the networks

def check_ids(ids, vocabulary, length):
    """Raise ValueError if ids [B,L] do not fit an encoder."""
    if ids.shape[1] > length:
        raise ValueError(f"captions of {ids.shape[1]} ids are longer than the encoder's {length}")
    # looking at the ids of a GPU would wait for it
    if ids.is_cpu and ids.numel() and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit the encoder's vocabulary "
                         f"of {vocabulary}: use the tokenizer that belongs to it")


class Attention(nn.Module):
    """Causal attention: each id sees itself and those before it."""

    def __init__(self, D, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(D, 3 * D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.in_proj(x).view(B, L, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                # three of [B,H,L,D/H]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.c_fc = nn.Linear(D, 4 * D)
        self.c_proj = nn.Linear(4 * D, D)

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))    # QuickGELU


class Block(nn.Module):
    def __init__(self, D, num_heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(D)
        self.attn = Attention(D, num_heads)
        self.ln_2 = nn.LayerNorm(D)
        self.mlp = Mlp(D)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ClipText(nn.Module):
    """CLIP's text tower; `net(ids [B,L])` returns the last hidden state, normed, [B,L,D].

    L may be smaller than `length`. Raises ValueError if it is larger and, on a CPU, if ids are
    outside the vocabulary.
    """

    def __init__(self, vocabulary, length, width, depth, num_heads):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} must be a multiple of the number of heads {num_heads}")
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.ln_final = nn.LayerNorm(width)

    def forward(self, ids):
        check_ids(ids, len(self.token_embedding.weight), len(self.positional_embedding))
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x)


class WordCodes(nn.Module):
    """A fixed random vector for each word, and for the padding, plus sines of its place.

    The encoder of a WordTokenizer: `net(ids [B,L])` returns [B,L,D], D even. Nothing is trained, or
    saved in a state dict.
    """

    def __init__(self, num_words, length, width, seed=0):
        super().__init__()
        # RandomState is frozen: the same codes with every version of NumPy
        codes = np.random.RandomState(seed).standard_normal((1 + num_words, width))
        frequencies = 10_000 ** -np.linspace(0, 1, width // 2, endpoint=False)
        angles = np.outer(np.arange(length), frequencies)
        places = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        self.register_buffer("codes", torch.tensor(codes).float(), persistent=False)
        self.register_buffer("places", torch.tensor(places).float(), persistent=False)

    def forward(self, ids):
        check_ids(ids, len(self.codes), len(self.places))
        return self.codes[ids] + self.places[:ids.shape[1]]


# ---- loading

RENAMED = {  # part of a name: ours; OpenAI's names first, then Hugging Face's
    "transformer.resblocks.": "blocks.", "in_proj_": "in_proj.",
    "text_model.": "", "embeddings.": "", "position_embedding.weight": "positional_embedding",
    "encoder.layers.": "blocks.", "self_attn.": "attn.", "fc1": "c_fc", "fc2": "c_proj",
    "final_layer_norm": "ln_final", "layer_norm": "ln_",
}
# neither the vision tower nor the causal mask, which archives keep among the tensors
OURS = r"token_embedding\.weight|positional_embedding|(blocks\.\d+|ln_final)\..*(weight|bias)"


def our_names(sd):
    """Return the tensors of the text tower, under our names."""
    found = {}
    for name, w in sd.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        if re.fullmatch(OURS, name):
            found[name] = w
    for name in [n for n in found if "q_proj" in n]:
        qkv = [found.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        found[name.replace("q_proj", "in_proj")] = torch.cat(qkv)
    return found


def clip_text_from_state_dict(sd, num_heads=None):
    """Return the text tower, frozen and in eval mode, of a state dict with either set of names.

    The rest of CLIP may be in it. Heads are 64 wide unless `num_heads` is given. Raises ValueError,
    one line.
    """
    try:
        sd = our_names(sd)
        vocabulary, width = sd["token_embedding.weight"].shape
        length = len(sd["positional_embedding"])
        depth = len({name.split(".")[1] for name in sd if name.startswith("blocks.")})
        heads = num_heads or max(1, width // HEAD_WIDTH)
        with torch.device("meta"):                          # no time lost on an initialisation
            net = ClipText(vocabulary, length, width, depth, heads)
        net.load_state_dict({name: w.float() for name, w in sd.items()}, assign=True)
    except Exception as e:
        why = " ".join(str(e).split())[:300]
        raise ValueError(f"not a text tower of CLIP ({type(e).__name__}: {why})") from None
    return net.eval().requires_grad_(False)


def load_clip_text(path):
    """Return the text tower of a file: .safetensors, torch's, or OpenAI's TorchScript archive.

    OpenCLIP's towers do not fit: they have the same names, but another activation. Raises
    ValueError or OSError, one line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--text {path} does not exist or is not a file")
    try:
        if Path(path).suffix == ".safetensors":
            sd = read_safetensors(path)
        elif is_torchscript(path):
            sd = read_torchscript(path)
        else:
            sd = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"--text {path} cannot be read: cut short, or of another format "
                         f"({type(e).__name__})") from None
    try:
        return clip_text_from_state_dict(sd)
    except ValueError as e:
        raise ValueError(f"--text {path}: {e}") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64}


def from_bytes(raw, dtype):
    """Return the tensor [N] that raw bytes are."""
    if not raw:
        return torch.empty(0, dtype=dtype)                  # torch.frombuffer refuses it
    return torch.frombuffer(bytearray(raw), dtype=dtype)


def read_safetensors(path):
    """Return {name: tensor} of a .safetensors file.

    The format: 8 bytes of length, a JSON header {name: {dtype, shape, data_offsets}}, raw data.
    """
    tensors = {}
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.tell()
        header.pop("__metadata__", None)
        for name, about in header.items():
            start, end = about["data_offsets"]
            file.seek(data + start)
            w = from_bytes(file.read(end - start), DTYPES[about["dtype"]])
            tensors[name] = w.view(about["shape"])
    return tensors


STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32,
            "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool}


def is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path):
    """Return {name: tensor} of a TorchScript archive; none of the code in it is run.

    torch.jit.load, which would run some, is deprecated. Modules become empty objects with
    attributes, and whatever a network does not need is refused: pickle.UnpicklingError.
    """
    archive = zipfile.ZipFile(path)
    top = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")

    class Empty:
        pass

    def tensor(storage, offset, size, stride, *rest):
        return storage.as_strided(size, stride, offset)

    def first(value, *rest):                                # of a list or dict and its type
        return value

    known = {"torch._utils._rebuild_tensor_v2": tensor, "collections.OrderedDict": dict}
    known |= {f"torch.{storage}": dtype for storage, dtype in STORAGES.items()}

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if module.split(".")[0] == "__torch__":
                return Empty
            if module == "torch.jit._pickle":
                return first
            if f"{module}.{name}" not in known:
                raise pickle.UnpicklingError(f"{module}.{name} is not part of a network")
            return known[f"{module}.{name}"]

        def persistent_load(self, pid):
            _, dtype, key, *_ = pid
            return from_bytes(archive.read(f"{top}data/{key}"), dtype)

    def collect(module, prefix):
        for name, value in vars(module).items():
            if isinstance(value, Empty):
                collect(value, f"{prefix}{name}.")
            elif isinstance(value, torch.Tensor):
                tensors[prefix + name] = value

    tensors = {}
    with archive, archive.open(f"{top}data.pkl") as file:
        collect(Reader(file).load(), "")
    return tensors


# ---- what a data set or a checkpoint says about its captions, and what that names

def fingerprint(net):
    """Return a hash of an encoder's weights, 16 hexadecimal digits.

    Weights are rounded to half precision, in which most files hold them: copies in float32 are the
    same encoder.
    """
    digest = hashlib.sha256()
    for name, w in sorted([*net.named_parameters(), *net.named_buffers()]):
        digest.update(name.encode() + w.half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(net):
    """Return the `about_text` of a ClipText: a dict, fit for JSON, for the two functions below."""
    vocabulary, width = net.token_embedding.weight.shape
    return {"encoder": "clip", "length": len(net.positional_embedding), "width": width,
            "vocabulary": vocabulary, "fingerprint": fingerprint(net)}


def open_tokenizer(about_text, merges=None):
    """Return the tokenizer that `about_text` describes.

    merges: CLIP's file; None fetches it once. Raises ValueError or OSError, one line.
    """
    if is_words(about_text):
        if merges:
            raise ValueError(f"--merges {merges} is for CLIP's captions, and these are of "
                             f"{len(about_text['words'])} words: leave it out")
        return WordTokenizer(about_text["words"], about_text["length"])
    path = merges or fetch(MERGES_URL, "--merges")
    tokenizer = Tokenizer(path, about_text.get("length", LENGTH))
    expected = about_text.get("vocabulary", tokenizer.vocabulary)
    if tokenizer.vocabulary != expected:
        raise ValueError(f"--merges {path} makes a vocabulary of {tokenizer.vocabulary}, but the "
                         f"text encoder's has {expected}: name the file that belongs to it")
    return tokenizer


def open_encoder(about_text, weights=None):
    """Return the frozen encoder that `about_text` describes; {"encoder": "clip"} is any CLIP.

    weights: CLIP's file; None fetches ViT-L/14 once. Raises ValueError, also if the file holds
    another encoder, or OSError, one line.
    """
    if is_words(about_text):
        if weights:
            raise ValueError(f"--text {weights} is for CLIP's captions, and these are of "
                             f"{len(about_text['words'])} words with codes of their own: leave it "
                             f"out")
        num_words = len(about_text["words"])
        return WordCodes(num_words, about_text["length"], about_text["width"]).eval()
    path = weights or fetch(CLIP_URL, "--text", CLIP_SHA256)
    net = load_clip_text(path)
    expected = about_text.get("fingerprint")
    if expected and fingerprint(net) != expected:
        raise ValueError(f"--text {path} is not the text encoder that the training data was "
                         f"prepared with: name that one")
    return net


def is_words(about_text):
    """Return whether captions are of a few words, not CLIP's; refuse any other kind."""
    kind = about_text.get("encoder")
    if kind not in ("words", "clip"):
        raise ValueError(f"text encoder {kind!r} is neither words nor clip")
    return kind == "words"


def fetch(url, flag, sha256=None):
    """Return the path of a file in torch's cache; if it is not there, fetch and check it."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256)
        except Exception as e:
            why = " ".join(str(e).split())
            raise OSError(f"{path.name} could not be fetched ({why}): download {url} and name the "
                          f"file with {flag}") from None
    return path
