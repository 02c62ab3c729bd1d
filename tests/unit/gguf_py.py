"""Files as gguf-py reads them."""

from unittest import mock

import gguf
import numpy as np


def read_by_gguf_py(path):
    """gguf-py's reader on the file's bytes: on its memory map, whose slices are slow, a vocabulary takes three times as
    long."""
    with mock.patch.object(np, "memmap", lambda name, mode: np.fromfile(name, np.uint8)):
        return gguf.GGUFReader(path)
