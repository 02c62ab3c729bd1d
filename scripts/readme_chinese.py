"""Chinese for what README.zh-CN.md takes from the table of defects, by the English text.

A text of mps_patches/registry.py that is new or was changed has no entry here, and scripts/build_readme.py says so.
"""

from __future__ import annotations

UNIPC_SEEN = "Washed, banded or garbled frames with uni_pc, no error; euler is clean."
UNIPC_WHEN = "uni_pc or uni_pc_bh2 with many steps or a high shift: half-logSNR steps h of 0.01 and less."

SEEN: dict[str, str] = {
    UNIPC_SEEN: "用 uni_pc 时画面发灰、有条带或花屏，没有报错；用 euler 则正常。",
    "Silent noise in long or large videos.": "长视频或大尺寸视频变成噪声，没有报错。",
    "Ghosting and smear that grow with length.": "重影和拖影，视频越长越明显。",
    "`total bytes of NDArray > 2**32`, `Invalid buffer size`, or the process is killed.": (
        "`total bytes of NDArray > 2**32`、`Invalid buffer size`，或者进程被系统终止。"
    ),
    "Wrong text or video from causal models, without an error.": "因果模型输出错误的文本或视频，没有报错。",
    "Garbage or NaN that changes from run to run.": "每次运行都不同的乱码或 NaN。",
    "Flat, tan or NaN frames after VAE encode (image to video, Wan 2.2 5B) and in causal VAEs": (
        "VAE 编码之后（图生视频、Wan 2.2 5B）以及因果 VAE 中，画面变成纯色、棕黄色或 NaN"
    ),
    '"MPSGaph does not support tensor dims larger than INT_MAX"': (
        "“MPSGaph does not support tensor dims larger than INT_MAX”"
    ),
    "All-black frames (LatentSync and other 3-D UNets)": "画面全黑（LatentSync 和其他 3-D UNet）",
    "Images and latents shifted by a pixel in places after resizing": "缩放之后，图像和 latent 的某些位置偏移一个像素",
    "Black frames, NaN": "黑屏、NaN",
    "Garbled or grey frames from code that splits a 3-D convolution into 2-D ones": (
        "把三维卷积拆成二维卷积的代码产生花屏或灰屏"
    ),
    "Garbage or slight errors in long attention and wide layers, on M1 and M2 only": (
        "只在 M1 和 M2 上：长注意力和宽的层中出现乱码或轻微误差"
    ),
    "Noise in very long attention": "非常长的注意力变成噪声",
    "Wrong rows, different from run to run": "某些行出错，每次运行都不同",
    "Damaged frames anywhere after joining very large tensors": "拼接非常大的张量之后，任意位置的画面损坏",
    "Zero rows gathered from very large tables": "从非常大的表中取出的行全是零",
    "NaN attention, black frames at random": "注意力出现 NaN，随机黑屏",
    "Schedulers give NaN or wrong images (diffusers and packs built on it)": (
        "调度器产生 NaN 或错误的图像（diffusers 以及基于它的节点包）"
    ),
    '"Output channels > 65536 not supported at the MPS device" (audio VAEs and vocoders)': (
        "“Output channels > 65536 not supported at the MPS device”（音频 VAE 和声码器）"
    ),
    '"Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn\'t support float64"': (
        "“Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64”"
    ),
    '"Placeholder storage has not been allocated on MPS device!", or "Expected a \'mps\' device type"': (
        "“Placeholder storage has not been allocated on MPS device!”或“Expected a 'mps' device type”"
    ),
    "Ancestral and SDE samplers give other frames than CUDA or the CPU with the same seed": (
        "种子相同，祖先采样器和 SDE 采样器的画面却与 CUDA 或 CPU 不同"
    ),
    '"MPS device does not support linear for non-float inputs"; text encoding takes minutes': (
        "“MPS device does not support linear for non-float inputs”；文本编码需要几分钟"
    ),
    "Wrong frames from every video VAE": "所有视频 VAE 的画面都错误",
    '"Invalid buffer size: ... GB"': "“Invalid buffer size: ... GB”",
    'The process ends with "commit an already committed command buffer"': (
        "进程结束，并显示“commit an already committed command buffer”"
    ),
}
"""What one sees."""

WHEN: dict[str, str] = {
    UNIPC_WHEN: "uni_pc 或 uni_pc_bh2，步数多或 shift 高：半 logSNR 步长 h 为 0.01 或更小。",
    "batch x heads x queries x keys in one score tensor at or beyond 2,147,483,648.": (
        "一个分数张量中的 batch × heads × queries × keys 达到或超过 2,147,483,648。"
    ),
    "bfloat16 or float16 attention over more than about 3,000 keys.": (
        "bfloat16 或 float16 注意力，键超过大约 3,000 个。"
    ),
    "scaled_dot_product_attention over thousands of tokens; other head dims than the prefill kernels'.": (
        "scaled_dot_product_attention 处理数千个 token；head dim 不在 prefill 内核支持之列。"
    ),
    "scaled_dot_product_attention(is_causal=True) in bfloat16 or float16.": (
        "bfloat16 或 float16 的 scaled_dot_product_attention(is_causal=True)。"
    ),
    "scaled_dot_product_attention with 1 to 8 queries.": "查询为 1 到 8 个的 scaled_dot_product_attention。",
    "F.pad on rank 5 or more, 65,536 or more elements behind the first padded dimension (256x256 frames)": (
        "5 阶或更高阶张量的 F.pad，第一个填充维度之后有 65,536 个或更多元素（256x256 的画面）"
    ),
    "bmm, baddbmm, repeat, cat or pow on a tensor of 2^31 or more elements, or on a slice of one": (
        "对 2^31 个或更多元素的张量或其切片使用 bmm、baddbmm、repeat、cat 或 pow"
    ),
    'F.interpolate(mode="nearest") on a rank-5 tensor in float16 or bfloat16': (
        'float16 或 bfloat16 的 5 阶张量上的 F.interpolate(mode="nearest")'
    ),
    'F.interpolate(mode="nearest-exact") by a factor that is not whole, for example 20 rows to 11': (
        '倍数不是整数的 F.interpolate(mode="nearest-exact")，例如 20 行缩到 11 行'
    ),
    "torch.nn.functional.rms_norm on more than 2^21 rows": "torch.nn.functional.rms_norm 处理超过 2^21 行",
    "F.conv2d with a non-contiguous weight": "权重不连续的 F.conv2d",
    "mm, bmm, matmul, einsum or linear with K >= 32,767 and 16 or more rows and columns": (
        "mm、bmm、matmul、einsum 或 linear，K >= 32,767 且行数和列数不少于 16"
    ),
    "torch.bmm or matmul, an input of more than 2^32 elements, or a non-contiguous one and such a result": (
        "torch.bmm 或 matmul，输入超过 2^32 个元素，或者输入不连续而结果超过 2^32 个元素"
    ),
    "F.linear with a bias on rank 3 or more, input.size(-3) > 65,536 (per-pixel attention over time)": (
        "3 阶或更高阶、带偏置的 F.linear，input.size(-3) > 65,536（逐像素的时间注意力）"
    ),
    "torch.cat or stack to more than 2^31 elements, each dimension below": (
        "torch.cat 或 stack 的结果超过 2^31 个元素，而每个维度都在此之下"
    ),
    "torch.index_select or embedding from a source of more than 2^31 elements": (
        "torch.index_select 或 embedding，来源超过 2^31 个元素"
    ),
    "torch.baddbmm(beta=0) with an uninitialised input": "输入未初始化的 torch.baddbmm(beta=0)",
    "a binary operation of an mps tensor and a 0-dim CPU tensor with a storage offset, such as sigmas[3]": (
        "mps 张量与带存储偏移的 0 维 CPU 张量（例如 sigmas[3]）之间的二元运算"
    ),
    "a convolution with more than 65,536 output channels, or a 1-D one with a longer output": (
        "输出通道超过 65,536 的卷积，或输出长度超过它的一维卷积"
    ),
    "a tensor in float64 or complex128 on mps (rotary embeddings and schedules of other packs)": (
        "mps 上的 float64 或 complex128 张量（其他节点包的旋转位置编码和调度）"
    ),
    "torch.randn and the like with a generator of another device": "torch.randn 等函数使用了其他设备的生成器",
    "noise drawn on mps, by samplers that add noise at each step": "每一步都加噪声的采样器在 mps 上抽取噪声",
    "GGUF and scaled weights whose dtype reads uint8 or float8, as other packs load them": (
        "其他节点包加载的 GGUF 和带缩放的权重，其 dtype 显示为 uint8 或 float8"
    ),
    "torch.nn.functional.conv3d on macOS 26.2": "macOS 26.2 上的 torch.nn.functional.conv3d",
    "a single tensor above Metal's maxBufferLength, such as a materialised score matrix": (
        "单个张量超过 Metal 的 maxBufferLength，例如完整展开的分数矩阵"
    ),
    "operations that fall back to the CPU, mixed with fused attention, or worker threads that use the GPU": (
        "退回 CPU 的运算与融合注意力混用，或者有工作线程使用 GPU"
    ),
}
"""When it happens."""

TREATED: dict[str, str] = {
    "patched where the probe fails": "探测失败时修补",
    "checked at the first call of that size, and patched from then on if it is wrong": (
        "在第一次达到该大小的调用时检查，若有错则从此修补"
    ),
    "patched in the models and VAEs that the pack loads, or with Patch Model / Patch VAE for MPS": (
        "在本包加载的模型和 VAE 中，或用“为 MPS 修补模型”“为 MPS 修补 VAE”修补"
    ),
    "calls that no model patch reaches": "模型补丁触及不到的调用",
    "avoided by the pack's loaders": "由本包的加载器避免",
    "reported by the Doctor": "由“MPS 诊断”报告",
    "off": "关闭",
}
"""What the pack does, in the pieces that the registry puts together."""
