"""Custom nodes for test servers on the simulated device: counters set to zero and read inside a graph.

Copied into a server's custom_nodes folder. SimulatedReset passes a value on; put before the part of the graph that
is measured. SimulatedStats writes the counters as <name>.json into the output folder, after the value it takes.
"""

import os

import folder_paths

import simulated_mps


class Anything(str):
    """A socket type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False


ANYTHING = Anything("*")


class SimulatedReset:
    """Resets the counters when the value passes."""

    RETURN_TYPES, FUNCTION, CATEGORY = (ANYTHING,), "reset", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANYTHING,)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def reset(self, value):
        simulated_mps.reset()
        return (value,)


class SimulatedStats:
    """Writes the counters when the value has been computed."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "read", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANYTHING,), "name": ("STRING",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def read(self, value, name):
        file = f"{name}.json"
        with open(os.path.join(folder_paths.get_output_directory(), file), "w") as output:
            output.write(simulated_mps.stats().json())
        return {"ui": {"stats": [{"filename": file, "subfolder": "", "type": "output"}]}}


NODE_CLASS_MAPPINGS = {"SimulatedReset": SimulatedReset, "SimulatedStats": SimulatedStats}
