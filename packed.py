"""Packed folders: photographs cropped and encoded once by prepare.py, read here for training.

    about = read_about("out/imagenet256")               # what data.json says, a dict
    train = PackedSet("out/imagenet256")                # CaptionedSet if about["text"]
    images, labels = train.read(rows)                   # uint8 [b,3,S,S], int64 [b]
    moments = train.moments(rows)                       # float16 [b,V,2C,h,w]

Every array is a plain .npy file that numpy opens, too. `layouts` says what each one holds.

Letters: N rows of the arrays, b rows read, S side in pixels, V views (2 with mirror images, else
1), C channels and h side of a latent, M captions of L tokens.
"""
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

READERS = 8             # threads that wait for the disk

ABOUT = ("complete", "rows", "size", "mirror", "vae", "fingerprint", "precision", "channels",
         "latent_size", "scale", "classes", "skipped", "crop", "text")  # what data.json says
ABOUT_TEXT = ("encoder", "length", "width", "vocabulary", "fingerprint", "features", "captions",
              "cut", "captions_fingerprint")    # and what it says of captions, under "text"


def read_about(folder):
    """Return what FOLDER/data.json says, a dict with the names of ABOUT. Raises ValueError."""
    path = Path(folder, "data.json")
    try:
        about = {"crop": "adm", "text": None, **json.loads(path.read_text())}   # older: neither
        text = about["text"]
        about["text"] = text and {name: text[name] for name in ABOUT_TEXT}
        return {name: about[name] for name in ABOUT}
    except Exception as e:
        why = f"it lacks {e}" if isinstance(e, KeyError) else line_of(e)
        raise ValueError(f"{path} cannot be read ({why}): is {folder} a folder made by "
                         f"prepare.py?") from None


def layouts(about):
    """Return {array: (shape, dtype)} of a packed folder; V = 2 with mirror images, else 1."""
    N = about["rows"]
    S = about["size"]
    V = 1 + about["mirror"]
    C = about["channels"]
    h = about["latent_size"]
    arrays = {"images": ((N, 3, S, S), "uint8"),
              "moments": ((N, V, 2 * C, h, h), "float16"),
              "labels": ((N,), "int64"),
              "done": ((N,), "uint8")}
    text = about["text"]
    if text:
        M = text["captions"]
        L = text["length"]
        arrays["captions"] = ((M, L), "uint16")
        if text["features"]:
            arrays["captions"] = ((M, L, text["width"]), "float16")
        arrays["first_caption"] = ((N + 1,), "int64")
    return arrays


def line_of(error):
    """Return an error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


class Rows:
    """Rows of an .npy file, read and written instead of mapped.

    Mapped pages would count as the process's own memory, and two machines that write to one page of
    a network disk would undo each other's rows. Raises ValueError if the file is not what data.json
    says.
    """

    def __init__(self, path, shape, dtype, mode="rb"):
        path = Path(path)
        remedy = "copy it again, or run prepare.py with an empty folder"
        try:
            self.file = open(path, mode)
            version = np.lib.format.read_magic(self.file)
            header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(self.file)
        except Exception as e:
            raise ValueError(f"{path} is missing or damaged ({line_of(e)}): {remedy}") from None
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        if header != (self.shape, False, self.dtype):
            raise ValueError(f"{path} holds {header[2]} {list(header[0])}, but data.json says "
                             f"{dtype} {list(shape)}: {remedy}")

        self.start = self.file.tell()                                   # of the first row, in bytes
        self.row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        whole = self.start + shape[0] * self.row_bytes
        there = path.stat().st_size
        if there != whole:
            raise ValueError(f"{path} has {there:,} bytes of {whole:,}: cut short; {remedy}")
        self.pool = ThreadPoolExecutor(READERS)

    def read(self, rows):
        """Return the rows, an int array [b], as a tensor [b,...]; uint16 as int64."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)

        def part(first):
            for i in range(first, len(rows), READERS):
                row = int(rows[i])
                begin = self.start + row * self.row_bytes
                raw = os.pread(self.file.fileno(), self.row_bytes, begin)
                if len(raw) != self.row_bytes:
                    raise OSError(f"{self.file.name} ends in the middle of row {row}: copy it "
                                  f"again")
                out[i] = np.frombuffer(raw, self.dtype).reshape(out.shape[1:])

        # threads, because each waits for the disk, and does so without Python's lock
        list(self.pool.map(part, range(min(READERS, len(rows)))))
        if out.dtype == np.uint16:                      # on which torch can do little
            out = out.astype(np.int64)
        return torch.from_numpy(out)

    def write(self, rows, values):
        """Write values [b,...] to the rows [b]; they are on the disk when this returns."""
        for row, value in zip(rows, np.asarray(values, self.dtype)):
            raw = value.tobytes()
            begin = self.start + int(row) * self.row_bytes
            try:
                written = os.pwrite(self.file.fileno(), raw, begin)
                if written != len(raw):                 # the first sign of a full disk
                    raise OSError(None, "only in part")
            except OSError as e:
                raise OSError(f"{self.file.name} could not be written ({e.strerror}): make room, "
                              f"and the same command resumes") from None
        if len(rows):
            os.fsync(self.file.fileno())


class PackedSet:
    """Images and moments of a packed folder; rows whose file was skipped do not count."""

    def __init__(self, folder):
        self.about = read_about(folder)
        if not self.about["complete"]:
            raise ValueError(f"--data {folder} is not finished: run prepare.py once more with the "
                             f"same flags")
        self.arrays = {}                                # all are opened: a damaged one is found now
        for name, layout in layouts(self.about).items():
            self.arrays[name] = Rows(Path(folder, f"{name}.npy"), *layout)
        self.images = self.arrays["images"]
        self.latents = self.arrays["moments"]
        labels = np.load(Path(folder, "labels.npy"))
        self.rows = np.flatnonzero(labels >= 0)                         # set's row -> array's row
        self.labels = torch.from_numpy(labels[self.rows])

    def __len__(self):
        return len(self.rows)

    def read(self, rows):
        """Return images uint8 [b,3,S,S] and labels [b] of the rows [b]."""
        return self.images.read(self.rows[np.asarray(rows)]), self.labels[rows]

    def moments(self, rows):
        """Return mean and standard deviation of the rows [b], float16 [b,V,2C,h,w]."""
        return self.latents.read(self.rows[np.asarray(rows)])


class CaptionedSet(PackedSet):
    """A packed folder with captions: token ids int64 [L], or a text encoder's features [L,C]."""

    def __init__(self, folder):
        super().__init__(folder)
        self.file = Path(folder, "captions.json")
        self.entries = self.arrays["captions"]
        first = np.load(Path(folder, "first_caption.npy"))
        self.first = first[self.rows]                                   # set's row -> its first entry
        self.count = first[self.rows + 1] - self.first
        self.null = self.entries.read([0])[0]                             # the caption ""

    def captions(self, rows, u):
        """Return a caption of each of the rows [b], [b,L] or float16 [b,L,C].

        u [b] in [0, 1) chooses it: floor(u * count) of the row's own `count` captions.
        """
        return self.entries.read(self.first[np.asarray(rows)] + self.chosen(rows, u))

    def strings(self, rows, u):
        """Return the same captions as they were written, a list of strings."""
        places = zip(self.rows[np.asarray(rows)], self.chosen(rows, u))
        try:
            texts = json.loads(self.file.read_text())
            return [texts[row][place] for row, place in places]
        except Exception as e:
            raise ValueError(f"{self.file} is missing or damaged ({line_of(e)}): copy it "
                             f"again") from None

    def chosen(self, rows, u):
        return np.floor(np.asarray(u, np.float64) * self.count[np.asarray(rows)]).astype(np.int64)
