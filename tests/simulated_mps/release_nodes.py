"""A custom node for test servers on the simulated device: what is live on it at a point of a graph.

Copied into a server's custom_nodes folder. SimulatedLive passes a value on and adds a line to <name>.jsonl in the
output folder: the stage, the peak since the line before, what is live, and what is live once the tables that decode
quantised weights are forgotten, in bytes.
"""

import gc
import json
import os
import sys

import folder_paths

import simulated_mps

TABLES = {
    "quantization.block_ops": ("constant",),
    "quantization.iq_quants": ("_grid", "_signs", "_even_signs"),
    "quantization.scaled_formats": ("_table", "_powers_of_two"),
}


class Anything(str):
    """A socket type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False


ANYTHING = Anything("*")


def live():
    gc.collect()
    return simulated_mps.stats().live


def forget_tables():
    for name, module in list(sys.modules.items()):
        for ending, functions in TABLES.items():
            if name.endswith(f".{ending}"):
                for function in functions:
                    getattr(module, function).cache_clear()


class SimulatedLive:
    """Writes what is live when the value passes."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (ANYTHING,), "read", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANYTHING,), "stage": ("STRING",), "name": ("STRING",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def read(self, value, stage, name):
        peak, held = simulated_mps.stats().peak, live()
        forget_tables()
        line = {"stage": stage, "peak": peak, "held": held, "beside_tables": live()}
        simulated_mps.reset()
        with open(os.path.join(folder_paths.get_output_directory(), f"{name}.jsonl"), "a") as output:
            output.write(json.dumps(line) + "\n")
        return (value,)


NODE_CLASS_MAPPINGS = {"SimulatedLive": SimulatedLive}
