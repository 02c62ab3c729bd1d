"""What people on Macs see when something goes wrong, and what to do: README's first table of troubleshooting.

``defects`` names the entries of mps_patches/registry.py that may be behind a symptom; every entry must be behind one.
"""

from __future__ import annotations

from typing import NamedTuple


class Symptom(NamedTuple):
    """One row. seen, do: English and Chinese."""

    seen: tuple[str, str]
    do: tuple[str, str]
    defects: tuple[str, ...] = ()


SYMPTOMS = (
    Symptom(
        (
            "`Trying to convert Float8_e4m3fn to the MPS backend ...`",
            "`Trying to convert Float8_e4m3fn to the MPS ...`",
        ),
        (
            "Load the file with *Load Diffusion Model (MPS)* or *Load Text Encoder (MPS)*: they read fp8 files. Or "
            "take a GGUF file.",
            "用“加载扩散模型 (MPS)”或“加载文本编码器 (MPS)”加载该文件：它们能读取 fp8 文件。也可以换用 GGUF 文件。",
        ),
        ("quantised-dtype",),
    ),
    Symptom(
        ("Black frames", "黑屏"),
        (
            "Run *MPS Doctor*. Put *Watch Output (MPS)* in front of the sampler: it ends the run at the step that "
            "broke, and names the likely cause. For a model or VAE of another loader, add *Patch Model for MPS* or "
            "*Patch VAE for MPS*.",
            "运行“MPS 诊断”。在采样器之前放“监视输出 (MPS)”：它会在出错的那一步结束运行，并指出可能的原因。模型或 VAE "
            "由其他加载器加载时，加上“为 MPS 修补模型”或“为 MPS 修补 VAE”。",
        ),
        ("interpolate-half-5d", "rms-norm-rows", "baddbmm-uninitialised", "pad-rank-5"),
    ),
    Symptom(
        ("Noise, garbled or washed frames", "噪声、花屏或画面发灰"),
        (
            "Take *euler* as sampler. Run *MPS Doctor*: it says what is wrong on this Mac. Then try fewer frames or a "
            "smaller size: if that helps, a size limit is behind it.",
            "采样器选 *euler*。运行“MPS 诊断”，它会说明这台 Mac 有什么问题。再试更少的帧或更小的尺寸：如果有效，原因"
            "就是尺寸上限。",
        ),
        (
            "expm1-coarse",
            "unipc-float32",
            "scores-2-31",
            "bmm-2-32",
            "matmul-large-k",
            "linear-large-batch",
            "cat-2-31",
            "index-select-2-31",
            "sdpa-short-query",
            "sdpa-causal-half",
            "conv-sliced-weight",
            "cpu-scalar-view",
        ),
    ),
    Symptom(
        ("Flat, tan or grey frames in image to video", "图生视频出现纯色、棕黄或灰色画面"),
        (
            "Load the VAE with *Load VAE (MPS)*, leave the patches on, and look at *MPS Doctor*. On macOS 26.2 update "
            "to 26.3.",
            "用“加载 VAE (MPS)”加载 VAE，保持补丁开启，并查看“MPS 诊断”。macOS 26.2 请更新到 26.3。",
        ),
        ("pad-rank-5", "conv3d-macos-26-2"),
    ),
    Symptom(
        ("Ghosting and smear in long videos", "长视频出现重影和拖影"),
        (
            "Leave attention on auto in *Patch Model for MPS*; models of this pack's loaders have it already.",
            "在“为 MPS 修补模型”中让注意力保持 auto；本包加载的模型已经如此。",
        ),
        ("softmax-half",),
    ),
    Symptom(
        ("The Mac swaps, everything becomes slow", "Mac 开始使用交换空间，一切变慢"),
        (
            "Take the workflow for your memory; *Plan Memory (MPS)* says before the run whether it fits. Use *Encode "
            "Prompts (MPS)* instead of a text encoder that stays, and *VAE Decode (MPS)* to decode. Put "
            "*Memory Governor (MPS)* in front of the sampler, and *Reduce Memory (MPS)* behind a model of another "
            "loader. Then fewer frames, a smaller size, a smaller quantisation, in this order.",
            "使用适合自己内存的工作流；“内存规划 (MPS)”在运行之前说明是否放得下。用“编码提示词 (MPS)”代替常驻内存的"
            "文本编码器，用“VAE 解码 (MPS)”解码。在采样器之前放“内存调控 (MPS)”，"
            "在其他加载器的模型之后放“减少内存 (MPS)”。然后依次减少帧数、缩小尺寸、换更小的量化。",
        ),
    ),
    Symptom(
        (
            "`MPS backend out of memory`, or the *Memory Governor* stopped the run",
            "`MPS backend out of memory`，或“内存调控”停止了运行",
        ),
        (
            "Close other programs and queue again: with *Memory Governor (MPS)* or *Checkpoint Sampling (MPS)* the run "
            "goes on where it stopped. If it stops again, take fewer frames.",
            "关闭其他程序后再次加入队列：有“内存调控 (MPS)”或“采样检查点 (MPS)”时会从停下的地方继续。如果再次停止，"
            "请减少帧数。",
        ),
    ),
    Symptom(
        (
            "`Invalid buffer size`, `total bytes of NDArray > 2**32`, `larger than INT_MAX`, or the process is killed",
            "`Invalid buffer size`、`total bytes of NDArray > 2**32`、`larger than INT_MAX`，或进程被终止",
        ),
        (
            "Put *Patch Model for MPS* behind a model of another loader: attention then runs in blocks. Behind the VAE "
            "take *Patch VAE for MPS*. Then fewer frames or a smaller size.",
            "在其他加载器的模型之后放“为 MPS 修补模型”：注意力将分块计算。VAE 之后用“为 MPS 修补 VAE”。然后减少帧数或"
            "缩小尺寸。",
        ),
        ("sdpa-materialises", "int-max-dims", "buffer-limit"),
    ),
    Symptom(
        ("Nodes are missing, red boxes in the workflow", "缺少节点，工作流中出现红框"),
        (
            "Update ComfyUI to 0.16 or later and restart it. Look for *apple-silicon-video* in the log of the start: "
            "it says why a pack did not load. The folder must lie in `ComfyUI/custom_nodes`.",
            "把 ComfyUI 更新到 0.16 或更高版本并重启。在启动日志中查找 *apple-silicon-video*：日志会说明为什么没有"
            "加载。文件夹必须在 `ComfyUI/custom_nodes` 中。",
        ),
    ),
    Symptom(
        ("A model file is not in the list of a loader", "加载器的列表中没有某个模型文件"),
        (
            "Put it into the folder that the workflow's note names and press *R* in the browser. GGUF files belong to "
            "`models/diffusion_models` and `models/text_encoders`.",
            "放入工作流说明中写明的文件夹，然后在浏览器中按 *R*。GGUF 文件放在 `models/diffusion_models` 和 "
            "`models/text_encoders`。",
        ),
    ),
    Symptom(
        ("Text encoding takes minutes", "文本编码需要几分钟"),
        (
            "Use *Encode Prompts (MPS)* or *Load Text Encoder (MPS)* with a GGUF file: it runs on the GPU. A prompt "
            "that was used before is taken from disk.",
            "用“编码提示词 (MPS)”或“加载文本编码器 (MPS)”加载 GGUF 文件：它在 GPU 上运行。用过的提示词直接从磁盘读取。",
        ),
        ("quantised-dtype",),
    ),
    Symptom(
        (
            "`doesn't support float64`, `Placeholder storage has not been allocated`, from another pack",
            "其他节点包报错 `doesn't support float64`、`Placeholder storage has not been allocated`",
        ),
        (
            "Switch the patch on in the terminal in which ComfyUI is started: `ASV_PATCH_FLOAT64=on`, "
            "`ASV_PATCH_GENERATOR_PLACEMENT=on`.",
            "在启动 ComfyUI 的终端中打开补丁：`ASV_PATCH_FLOAT64=on`、`ASV_PATCH_GENERATOR_PLACEMENT=on`。",
        ),
        ("float64", "generator-placement"),
    ),
    Symptom(
        ("`Output channels > 65536 not supported`", "`Output channels > 65536 not supported`"),
        ("Leave the patch on, or update macOS.", "保持补丁开启，或更新 macOS。"),
        ("conv-output-channels",),
    ),
    Symptom(
        ("`No module named 'decord'`, from another pack", "其他节点包报错 `No module named 'decord'`"),
        (
            "Install this pack and restart: it offers `decord` to packs that import it.",
            "安装本包并重启：它向需要的节点包提供 `decord`。",
        ),
    ),
    Symptom(
        ("Other frames than on another machine, same seed", "种子相同，画面却与其他机器不同"),
        (
            "Take *euler*, which adds no noise, or set `ASV_PATCH_RANDOMNESS=on`.",
            "使用不加噪声的 *euler*，或设置 `ASV_PATCH_RANDOMNESS=on`。",
        ),
        ("randomness",),
    ),
    Symptom(
        ("Frames or pictures are shifted by a pixel", "画面偏移一个像素"),
        ("Leave the patch on.", "保持补丁开启。"),
        ("nearest-exact-rounding",),
    ),
    Symptom(
        (
            "The process ends with `commit an already committed command buffer`",
            "进程结束并显示 `commit an already committed command buffer`",
        ),
        (
            "Send the report of *MPS Doctor* to the pack whose node ran last: one of its operations fell back to the "
            "CPU.",
            "把“MPS 诊断”的报告发给最后运行的节点所属的节点包：它的某个运算退回到了 CPU。",
        ),
        ("command-buffer",),
    ),
)
