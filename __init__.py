"""Apple Silicon Video: ComfyUI nodes that make video generation on Apple Silicon work.

ComfyUI calls ``comfy_entrypoint``; everything else is imported from there, so importing the pack alone does nothing.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the pack's ComfyExtension (ComfyUI's V3 node interface)."""
    from .nodes import AppleSiliconVideo

    return AppleSiliconVideo()
