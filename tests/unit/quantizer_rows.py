"""Rows of weights on which the quantiser is compared with llama.cpp's, the same on every machine.

tests/data/llama_quantize_rmse.json holds llama.cpp's errors on exactly these; a change here needs new figures.
"""

import numpy as np

KINDS = ("gaussian", "heavy-tailed", "outliers", "constant", "shifted")
ROWS, COLUMNS = 32, 1024
STD = 0.02


def rows(kind):
    """float32 [32, 1024] of one of ``KINDS``."""
    random = np.random.default_rng([0, KINDS.index(kind)])
    size = (ROWS, COLUMNS)
    if kind == "constant":
        return np.repeat(np.linspace(-0.7, 0.9, ROWS)[:, None], COLUMNS, axis=1).astype(np.float32)
    if kind == "heavy-tailed":
        return (random.standard_t(3, size) * STD).astype(np.float32)
    values = random.standard_normal(size) * STD
    if kind == "outliers":
        values[random.random(size) < 0.005] *= 30
    return (values + (0.03 if kind == "shifted" else 0)).astype(np.float32)


def importance():
    """float32 [1024], positive, of very different sizes."""
    return np.exp(np.random.default_rng([0, 99]).standard_normal(COLUMNS)).astype(np.float32)
