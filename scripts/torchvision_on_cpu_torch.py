"""Lets a CPU-only torch import a torchvision wheel linked to CUDA. Test harness only, not the product.

Such a wheel cannot load its C++ library, and its Python side then stops at operators that nobody declared.
``scripts/environment.py`` copies this module into ``.venv`` if ``import torchvision`` fails there, with a .pth
file that imports it in every process: that costs next to nothing, since torch is touched only once torchvision
is asked for. The operators can then be named, not run. Their schemas are the C++ library's own.
"""

import sys

ROIS = "Tensor rois"
POOLED = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
SHAPE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
SAMPLING = "int sampling_ratio"
MAPPING = "Tensor channel_mapping"
SCALES = "float input_scale, int input_zero_point, float rois_scale, int rois_zero_point"
DEFORM = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
    "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, "
    "bool use_mask"
)

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align(Tensor input, {ROIS}, {POOLED}, {SAMPLING}, bool aligned) -> Tensor",
    f"qroi_align(Tensor input, {ROIS}, {SCALES}, {POOLED}, {SAMPLING}, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, {ROIS}, {POOLED}, {SHAPE}, {SAMPLING}, bool aligned) -> Tensor",
    f"roi_pool(Tensor input, {ROIS}, {POOLED}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, {ROIS}, Tensor argmax, {POOLED}, {SHAPE}) -> Tensor",
    f"ps_roi_align(Tensor input, {ROIS}, {POOLED}, {SAMPLING}) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, {ROIS}, {MAPPING}, {POOLED}, {SAMPLING}, {SHAPE}) -> Tensor",
    f"ps_roi_pool(Tensor input, {ROIS}, {POOLED}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, {ROIS}, {MAPPING}, {POOLED}, {SHAPE}) -> Tensor",
    f"deform_conv2d({DEFORM}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class DeclareOperators:
    """Import hook: declares torchvision's operators just before torchvision is first imported."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Find nothing itself; the ordinary finders go on once the operators stand."""
        if name != "torchvision" or cls not in sys.meta_path:
            return None
        sys.meta_path.remove(cls)
        import torch

        cls.library = torch.library.Library("torchvision", "DEF")
        for schema in OPERATORS:
            cls.library.define(schema)
        return None


sys.meta_path.insert(0, DeclareOperators)
