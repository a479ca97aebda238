"""What layers keep for the backward (recompute.py): memory and seconds of a training pass, forward and backward.

    python benchmarks/bench_recompute.py [--shapes 4x256 8x512] [--dtypes fp32 bf16] [--rounds N] [--no-append]

Random Llama-shaped decoders with tied embeddings, groups of one prompt, the fused cross-entropy. The modes take turns in
one process on one thread; the best CPU seconds of each count. Memory is the peak of all tensors that operations make
(weights are not among them), and what the forward leaves; gradients are compared bit for bit.
"""

import argparse
import time

import torch
from common import append_rows, print_table

from r1fast.batch import pack
from r1fast.forward import hidden_states
from r1fast.kernels.linear_cross_entropy import linear_cross_entropy
from r1fast.model import Decoder, ModelSpec
from r1fast.probe import LiveBytes
from r1fast.recompute import MODES
from r1fast.types import PackedBatch, Sequence

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# layers, width, MLP width, vocabulary; prompts, tokens of one, completions of each, their tokens
SHAPES = {
    "4x256": (4, 256, 768, 2048, 8, 24, 8, 65),
    "8x512": (8, 512, 1536, 16384, 1, 256, 16, 96),
}


def make(shape: str, dtype: torch.dtype) -> tuple[Decoder, PackedBatch]:
    L, D, F, V, prompts, P, G, R = SHAPES[shape]
    spec = ModelSpec("llama", V, D, F, L, D // 64, D // 128, 64, tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(0)

    def words(n: int) -> list[int]:
        return torch.randint(V, (n,), generator=generator).tolist()

    sequences = []
    for _ in range(prompts):
        prompt = words(P)
        sequences += [Sequence(prompt, words(R)) for _ in range(G)]
    (batch,) = pack(sequences, 10**9, [1.0] * len(sequences), share_prompts=True)
    return Decoder(spec, dtype=dtype, seed=0), batch


def loss_of(model: Decoder, batch: PackedBatch) -> torch.Tensor:
    hidden = hidden_states(model, batch)
    weight, ids = model.head_weight, batch.target_ids
    return linear_cross_entropy(hidden, weight, ids, reduction="mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-append", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, rows = [], []
    for shape in args.shapes:
        for name in args.dtypes:
            model, batch = make(shape, DTYPES[name])
            best, memory, first = dict.fromkeys(MODES, float("inf")), {}, []
            for mode in MODES:  # which also warms up
                model.checkpointing = mode
                with LiveBytes(model.parameters()) as live:
                    loss = loss_of(model, batch)
                    kept = live.now
                    loss.backward()
                memory[mode] = kept, live.most
                gradients = [p.grad for p in model.parameters()]
                model.zero_grad()
                first = first or gradients
                assert all(torch.equal(a, b) for a, b in zip(first, gradients, strict=True)), mode
            for _ in range(args.rounds):
                for mode in MODES:
                    model.checkpointing = mode
                    began = time.process_time()
                    loss_of(model, batch).backward()
                    best[mode] = min(best[mode], time.process_time() - began)
                    model.zero_grad()
            label = f"{shape}, {batch.num_tokens} tokens, {name}"
            for mode in MODES:
                kept, most = (x / 2**20 for x in memory[mode])
                rows += [
                    (label, mode, "forward + backward", best[mode], "CPU s"),
                    (label, mode, "peak of tensors", most, "MiB"),
                    (label, mode, "kept by the forward", kept, "MiB"),
                ]
                ratios = best[mode] / best["none"], memory[mode][1] / memory["none"][1]
                table.append(
                    [label, mode, f"{best[mode]:.3f}", f"{ratios[0]:.3f}", f"{most:.0f}",
                     f"{ratios[1]:.2f}", f"{kept:.0f}"]
                )  # fmt: skip
    print_table(["shape", "mode", "CPU s", "of none", "peak, MiB", "of none", "kept, MiB"], table)
    if not args.no_append:
        append_rows("recompute", rows)


if __name__ == "__main__":
    main()
