"""One JumpReLU step: against its products alone, by kind of kernel, and against SAELens' step."""

from collections.abc import Callable

import torch
import trainer_speed as speed

from kit.record import Kit
from trainer.device import tf32_products


def trainer(kit: Kit) -> None:
    """One JumpReLU step: against the dense bfloat16 limit, by kind of kernel, and against SAELens' step."""
    for width in kit.size.widths:
        speed.D, speed.W, speed.B, speed.DEVICE = kit.size.d, width, kit.size.batch_rows, kit.device
        flop = 10 * speed.D * speed.W * speed.B
        name = f"width {width}"
        bare = kit.seconds(speed.products(torch.bfloat16))
        kit.figure("trainer", f"{name}: its five products alone, bfloat16", 1e3 * bare, "ms")
        for compute in ("bfloat16", "float32"):
            step = speed.ours("jumprelu", compute)
            with tf32_products(kit.device):
                seconds, kinds = kit.seconds(step), _by_kind(kit, step)
            kit.figure("trainer", f"{name}: step, {compute} products", 1e3 * seconds, "ms", bare / seconds, "products")
            kit.figure("trainer", f"{name}: step, {compute} products", speed.B / seconds, "tokens/s")
            kit.figure("trainer", f"{name}: step, {compute} products", flop / seconds / 1e12, "TFLOP/s")
            for kind, spent in kinds.items():
                what = f"{name}: {compute}, {kind}"
                kit.figure("trainer", what, 1e3 * spent, "ms", spent / seconds, "the step")
        if kit.device == "cuda":
            kit.figure("trainer", f"{name}: peak device memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
        try:
            other = kit.seconds(speed.saelens("bfloat16"))
        except ImportError as e:
            kit.record.not_measured[f"SAELens' step, {name}"] = str(e)
        else:
            kit.figure("trainer", f"{name}: SAELens' step, autocast", 1e3 * other, "ms")


KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm"),
    "copies between host and device": ("Memcpy HtoD", "Memcpy DtoH"),
    "reductions": ("reduce", "aten::sum", "norm"),
}
"""Kernels by a part of their name; the rest is pointwise."""


def _by_kind(kit: Kit, step: Callable[[], object]) -> dict[str, float]:
    """Seconds of a step that the device spends in each kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if kit.device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        for _ in range(kit.size.rounds):
            step()
        kit.wait()
    spent = dict.fromkeys([*KINDS, "pointwise and the rest"], 0.0)
    for event in profiled.key_averages():
        name = event.key
        kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "pointwise and the rest")
        micros = event.self_device_time_total if kit.device == "cuda" else event.self_cpu_time_total
        spent[kind] += 1e-6 * micros / kit.size.rounds
    return {kind: seconds for kind, seconds in spent.items() if seconds}
