"""Seconds from two numbers of a device, FLOP/s and bytes/s: where a layer is not timed, or there is no device."""

from __future__ import annotations

from r1fast.planner import Job
from r1fast.probe import Pass, Speed

SHARE = 0.7  # of either number that is reached
ATTENTION_SHARE = 0.5  # of the FLOP/s that attention reaches, of those
HOST_SECONDS = 1e-3  # a decoding step takes on the host


def roofline(job: Job, layer_bytes: float, gemm: float, bandwidth: float) -> Speed:
    """`layer_bytes`: what a layer's forward writes for each token, kept or not."""
    flop, byte = 1 / (SHARE * gemm), 1 / (SHARE * bandwidth)
    spec, size, item = job.spec, job.size, job.dtype.itemsize
    linear, head = 2.0 * size.linears * flop, 2.0 * size.table * flop
    pair = 4.0 * spec.num_heads * spec.head_dim * spec.num_layers * flop / ATTENTION_SHARE
    written = layer_bytes * spec.num_layers * byte
    weights = (size.linears + size.table) * item * byte
    again = job.checkpointing == "full"  # the forward, in the backward
    positions = 2 * spec.num_kv_heads * spec.head_dim * spec.num_layers * item
    return Speed(
        gemm=gemm,
        # the backward reads what was written and writes gradients of the same size
        train=Pass((3 + again) * (linear + written), (3.5 + again) * pair, 3 * head),
        forward=Pass(linear + written, pair, head),
        update=28 * size.trained * byte,  # weight, gradient and moments: four read, three written
        begin=weights,
        prefill=linear + written,
        step=weights + HOST_SECONDS,
        row=linear + head,
        position=positions * byte,
    )
