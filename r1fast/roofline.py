"""Seconds from two numbers of a device, FLOP/s and bytes/s: where a layer is not timed, or there is no device."""

from __future__ import annotations

from r1fast.planner import Job
from r1fast.probe import Pass, Speed

SHARE = 0.7  # of either number that is reached
ATTENTION_SHARE = 0.5  # of the FLOP/s that attention reaches, of those
HOST_SECONDS = 1e-3  # a decoding step takes on the host


def roofline(job: Job, gemm: float, bandwidth: float) -> Speed:
    flop, byte = 1 / (SHARE * gemm), 1 / (SHARE * bandwidth)
    spec, size, item = job.spec, job.size, job.dtype.itemsize
    linear, head = 2.0 * size.linears * flop, 2.0 * size.table * flop
    pair = 4.0 * spec.num_heads * spec.head_dim * spec.num_layers * flop / ATTENTION_SHARE
    kept = job.footprint.layer * spec.num_layers * byte  # what a forward leaves is written once
    weights = (size.linears + size.table) * item * byte
    positions = 2 * spec.num_kv_heads * spec.head_dim * spec.num_layers * item
    return Speed(
        gemm=gemm,
        # the backward reads what was kept and writes gradients of the same size
        train=Pass(3 * linear + 3 * kept, 3.5 * pair, 3 * head),
        forward=Pass(linear + kept, pair, head),
        update=28 * size.trained * byte,  # weight, gradient and moments: four read, three written
        begin=weights,
        prefill=linear + kept,
        step=weights + HOST_SECONDS,
        row=linear + head,
        position=positions * byte,
    )
