"""Research: how much of softmax(z) could the head's backward skip, with a bound on what is lost?

    python benchmarks/sparsity.py [RUN/model ...]

The forward knows the exact mass of each (row, vocabulary tile), so a tile that holds next to
nothing of each of its rows could be left out of both backward products, and the mass dropped per
row is a certificate of the error. Three savings are measured, for rows as they come, 128 at a time:

    columns of a row     what one row needs: the most any scheme could save
    union of columns     columns that some row of the 128 needs: gather W[columns], dense GEMMs
    128 x 128 tiles      tiles that some row needs, in vocabulary order: skip whole MMA tiles

A share is of the vocabulary, mean over blocks. "Needs": dropping must leave each row 1 - loss of
its mass. The rows: Zipf-like logits of a 151,936 word vocabulary, at several entropies, and the
sampled completions of models trained by r1fast, where folders are given.
"""

import argparse

import torch
from common import append_rows, print_table
from torch import Tensor

BLOCK = 128
LOSSES = (1e-2, 1e-3, 1e-5)


def columns_of_a_row(p: Tensor) -> dict[float, float]:  # (R, C)
    """Share of the columns that a row needs to keep 1 - loss of its mass, mean over rows."""
    dropped = p.sort(1).values.cumsum(1)
    return {loss: (dropped > loss).double().mean().item() for loss in LOSSES}


def columns_of_all(mass: Tensor) -> dict[float, float]:  # (R, C)
    """Share that must stay so that no row drops over `loss`: smallest largest-mass goes first."""
    dropped = mass[:, mass.amax(0).argsort()].cumsum(1)
    return {loss: (dropped > loss).any(0).double().mean().item() for loss in LOSSES}


def shares(p: Tensor) -> dict[float, tuple[float, float, float]]:  # (R, V)
    padded = torch.nn.functional.pad(p, (0, -p.shape[1] % BLOCK))
    tiles = padded.view(len(p), -1, BLOCK).sum(2)
    row, union, tile = columns_of_a_row(p), columns_of_all(p), columns_of_all(tiles)
    return {loss: (row[loss], union[loss], tile[loss]) for loss in LOSSES}


def zipf_blocks(exponent: float, num_blocks: int = 1, V: int = 151_936):
    """Rows whose sorted probabilities fall like rank^-exponent.

    A word's rank is shared in part: frequent words are frequent everywhere, the rest is the row's own.
    """
    g = torch.Generator().manual_seed(0)
    common = torch.randperm(V, generator=g).float().clamp(min=1).log()
    for _ in range(num_blocks):
        own = (torch.rand(BLOCK, V, generator=g) * V).clamp(min=1).log()
        order = (common + own).argsort(1)
        falling = torch.arange(1, V + 1).double().pow(-exponent)
        p = torch.empty(BLOCK, V, dtype=torch.float64)
        yield p.scatter_(1, order, (falling / falling.sum()).expand(BLOCK, V))


@torch.no_grad()
def model_blocks(folder: str, num_problems: int = 64):
    """Next-token distributions where a model that the demo trained samples its completions."""
    from r1fast.batch import pack
    from r1fast.config import load_config
    from r1fast.forward import hidden_states
    from r1fast.policy import load_policy
    from r1fast.rollout.engine import Engine
    from r1fast.rollout.sampler import SamplingParams
    from r1fast.running_sum import make_problems
    from r1fast.templates import encode_prompts
    from r1fast.types import Sequence

    policy = load_policy(folder)
    template = load_config("configs/demo.toml").template
    prompts, _, _ = encode_prompts(
        make_problems(num_problems, seed=7, held_out=True), policy.tokenizer, template, 256
    )
    engine = Engine(policy.model, policy.eos_ids, decode=policy.decode, max_batch_size=64)
    seeds = [[n] for n in range(len(prompts))]
    groups = engine.generate(prompts, 1, SamplingParams(1.0, 1.0, 0, 128), seeds=seeds)
    sequences = [Sequence(g.prompt_ids, g.completions[0].token_ids) for g in groups]
    for batch in pack(sequences, 4096, [0.0] * len(sequences)):
        hidden = hidden_states(policy.model, batch)
        for rows in hidden.split(BLOCK):
            yield torch.softmax((rows @ policy.model.head_weight.t()).double(), 1)


def entropy(p: Tensor) -> float:
    return -torch.xlogy(p, p).sum(1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="Hugging Face folders of trained models")
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    args = parser.parse_args()
    sources = {f"Zipf {a}": lambda a=a: zipf_blocks(a) for a in (1.0, 1.2, 1.5, 2.0, 3.0)}
    sources |= {folder: lambda f=folder: model_blocks(f) for folder in args.models}
    table, rows = [], []
    for name, blocks in sources.items():
        found = [(entropy(p), shares(p)) for p in blocks()]
        H = sum(h for h, _ in found) / len(found)
        for loss in LOSSES:
            mean = [sum(s[loss][n] for _, s in found) / len(found) for n in range(3)]
            table.append([name, f"{H:.2f}", f"{loss:g}", *(f"{100 * x:.2f}%" for x in mean)])
            for metric, value in zip(("row", "union", "tiles"), mean, strict=True):
                rows.append((f"{name}, entropy {H:.2f}", f"loss {loss:g}", metric, value, "share"))
    print_table(
        ["rows", "entropy", "loss", "columns of a row", "union of 128", "128x128 tiles"], table
    )
    if not args.no_append:
        append_rows("sparsity", rows)


if __name__ == "__main__":
    main()
