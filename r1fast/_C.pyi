from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

# `lengths` is a list or tuple of positive ints, or a 1-d integer array of any width. All functions are deterministic
# (ties go to the lower index) and release the GIL. They raise ValueError on a sequence longer than `token_budget`,
# a length or budget below 1, or a total over 2**63 - 1; TypeError on what is not an integer.
Lengths: TypeAlias = Sequence[int] | NDArray[np.integer]

def pack(lengths: Lengths, token_budget: int) -> list[list[int]]:
    """First-fit decreasing: the indices of the sequences in each micro-batch, longest first."""

def pack_flat(
    lengths: Lengths,  # (S,)
    token_budget: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # order (S,), offsets (num_bins + 1,)
    """What `pack` returns, without a Python object per sequence: bin b is order[offsets[b]:offsets[b + 1]]."""

def pack_balanced(
    lengths: Lengths,  # (S,)
    token_budget: int,
    num_ranks: int,
    costs: ArrayLike | None = None,  # (S,) finite and >= 0; the lengths if None
) -> list[list[list[int]]]:
    """rank -> micro-batch -> sequence indices, ascending. Every rank gets the same number of micro-batches
    (ceil(len(pack(...)) / num_ranks)), with costs evened over ranks and micro-batches. A micro-batch is empty
    only when there are fewer sequences than micro-batches."""

def pack_groups(
    prompt_lengths: Lengths,  # (number of groups,)
    completion_lengths: Sequence[Lengths],  # of each group; a completion may have length 0
    token_budget: int,
    cost_per_token: float = 0.0,  # of a token outside attention, in pairs of query and key
    num_ranks: int = 1,
) -> list[list[list[tuple[int, list[int]]]]]:
    """rank -> micro-batch -> (group, indices of its completions), both ascending. A micro-batch holds a prompt once
    and at most `token_budget` tokens. A group is split only if it is over the budget alone. Every rank gets the same
    number of micro-batches, with costs (attention and the rest) evened as in `pack_balanced`. Raises ValueError for
    a completion that is over the budget with its prompt, and for an empty group or prompt."""

def lower_bound(lengths: Lengths, token_budget: int) -> int:
    """No packing uses fewer micro-batches (Martello and Toth's L2; at least ceil(sum / token_budget))."""

class BlockAllocator:
    """Holders of the blocks of a KV cache, and its prefix cache. `blocks` and `tokens` are 1-d integer arrays.

    Raises ValueError for sizes that cannot be, for a block that has no holder (a double free) and for more blocks
    than are available. Not for several threads at once.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_cached: int = -1,  # registered blocks kept without a holder; -1: as many as were ever held at once
        hash_bits: int = 64,  # fewer make collisions, for tests
    ) -> None: ...
    num_blocks: int
    block_size: int
    num_used: int  # that have a holder
    num_cached: int  # registered, without one
    num_available: int  # that `allocate` may take: free or cached
    peak_used: int
    def holders(self, block: int) -> int: ...
    def allocate(self, count: int) -> NDArray[np.int32]:
        """`count` blocks with one holder each; all or none."""

    def share(self, blocks: ArrayLike) -> None:
        """One more holder for each."""

    def free(self, blocks: ArrayLike) -> None:
        """One holder less for each; a registered block without a holder stays findable for a while."""

    def lookup(self, tokens: ArrayLike) -> NDArray[np.int32]:
        """The registered blocks that the tokens begin with, each with one more holder."""

    def insert(self, tokens: ArrayLike, blocks: ArrayLike) -> None:
        """Registers the full blocks of a sequence, which hold the tokens from its first on."""

    def reset(self) -> None:
        """Forgets what is registered; holders keep their blocks."""

class Tails:
    """Positions of running sequences that fill no tile yet, held one by one in blocks of the same pool.

    Arrays are those of rollout.rows.Rows, over slots: `slots` (n,) says which. Raises ValueError for blocks of other than
    16 positions and for a slot that is not one. Not for several threads at once.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        element_bytes: int,
    ) -> None: ...
    def add_layer(self, keys: int, values: int) -> None:
        """The addresses of a layer's tiled keys and values, which stay where they are."""
    num_positions: int  # of all slots
    table: NDArray[
        np.int32
    ]  # (S, 16), a view: the slots, below 0, of a sequence's positions; entries behind them are not read

    def missing(
        self, slots: NDArray[np.int64], length: NDArray[np.int64], num_blocks: NDArray[np.int64]
    ) -> int:
        """Blocks that `grow` takes, less those that it gives back."""

    def grow(
        self,
        slots: NDArray[np.int64],
        length: NDArray[np.int64],
        blocks: NDArray[
            np.int32
        ],  # (S, M): full ones, then -1 while there are positions on their own; written
        num_blocks: NDArray[np.int64],  # full ones; written
    ) -> bool:
        """Room for position length - 1 of each. False, and nothing is done, if there are not enough blocks."""

    def adopt(self, slot: int, block: int, num_positions: int) -> bool:
        """The first positions of a block, copied to a slot that has none. False if there are not enough blocks."""

    def release(self, slot: int) -> None:
        """The slot has none any more."""

# What follows is called by kernels/cpu_head.py alone, which knows the layouts: an address is Tensor.data_ptr(), 0 for an
# absent tensor; strides and sizes count elements. Results are the same bits for any `num_threads`. The GIL is released.
Address: TypeAlias = int

def cpu_level() -> str:
    """What the level "auto" is: avx512, avx2 or baseline, the best that this CPU has and R1FAST_CPU_LEVEL allows.

    ValueError, as from everything that has a level, if that variable asks for what is not one, or not here; empty is unset.
    """

def has_avx512_bf16() -> bool:
    """Whether AVX-512 multiplies and rounds bfloat16 by its own instructions, not float32's. R1FAST_CPU_BF16=0: it does not."""

def native_level(bf16: bool) -> str:
    """What "auto" is for the native_ functions of float32 or bfloat16: amx, avx512, avx2; baseline where they do not run."""

def head_ld(num_rows: int) -> int:
    """Words of 32 bits between two rows of the transposed E of `num_rows` rows of hidden."""

def head_words(num_rows: int, vocab_size: int, bf16: bool) -> int:
    """Words of 32 bits that hold the transposed E."""

def epilogue(
    z: Address,  # (R, V) float32 or bfloat16, becomes E
    ld: int,
    bf16: bool,
    num_rows: int,
    vocab_size: int,
    bias: Address,  # (V,) or 0
    target_ids: Address,  # (R,) int64
    anchor: Address,  # (R,)
    inv_temperature: float,
    softcap: float,  # 0: none
    s: Address,  # (R,), written
    sz: Address,  # (R,), written, or 0
    level: str,  # auto, baseline, avx2, avx512; ValueError for one that this CPU does not have
    num_threads: int,
) -> None: ...
def affine_rows(
    e: Address,  # (R, V)
    ld: int,
    bf16: bool,
    num_rows: int,
    vocab_size: int,
    a: Address,  # (R,)
    b: Address,  # (R,)
    level: str,
    num_threads: int,
) -> None: ...
def compact_rows(
    e: Address,  # (R, V)
    ld: int,
    bf16: bool,
    vocab_size: int,
    kept: Address,  # (num_kept,) int64, increasing
    num_kept: int,
    num_threads: int,
) -> None: ...
def narrow_to_bf16(x: Address, size: int, num_threads: int) -> None:
    """float32 becomes bfloat16 in the first half of its memory."""

def advise_huge_pages(memory: Address, num_bytes: int) -> None:
    """Asks for huge pages where fresh memory is large; nothing where there are none."""

def native_forward(
    hidden: Address,  # (R, D)
    ld_hidden: int,
    weight: Address,  # (V, D)
    ld_weight: int,
    width: int,
    bf16: bool,
    bias: Address,
    target_ids: Address,
    anchor: Address,
    inv_temperature: float,
    softcap: float,
    e: Address,  # head_words(...) words, or 0
    ld: int,
    num_rows: int,
    vocab_size: int,
    s: Address,
    sz: Address,
    level: str,  # auto, avx2, avx512 or, for bfloat16, amx; ValueError for one that this CPU does not have
    num_threads: int,
) -> None: ...
def native_dhidden(
    e: Address,
    ld: int,
    num_rows: int,
    vocab_size: int,
    weight: Address,
    ld_weight: int,
    width: int,
    bf16: bool,
    dhidden: Address,  # (R, D) float32, contiguous
    level: str,
    num_threads: int,
) -> None: ...
def native_dweight(
    e: Address,
    ld: int,
    num_rows: int,
    vocab_size: int,
    bf16: bool,
    x: Address,  # (R, D)
    ld_x: int,
    x_bf16: bool,
    width: int,
    dweight: Address,  # (V, D) float32
    ld_dweight: int,
    accumulate: bool,
    level: str,
    num_threads: int,
) -> None: ...
def native_dbias(
    e: Address,
    ld: int,
    num_rows: int,
    vocab_size: int,
    bf16: bool,
    x: Address,  # (R,)
    dbias: Address,  # (V,)
    accumulate: bool,
    level: str,
    num_threads: int,
) -> None: ...
def native_affine(
    e: Address,
    ld: int,
    num_rows: int,
    vocab_size: int,
    bf16: bool,
    a: Address,  # (R,)
    b: Address,  # (R,)
    level: str,
    num_threads: int,
) -> None: ...
def native_compact(
    e: Address,
    ld: int,
    num_rows: int,
    vocab_size: int,
    bf16: bool,
    kept: Address,  # (num_kept,) int64, increasing
    num_kept: int,
    num_threads: int,
) -> None: ...

# Called by kernels/cpu_attention.py, under the same rules. A token's heads lie side by side.
def attention_forward(
    q: Address,  # (T, H, Dh)
    ld_q: int,  # elements between two tokens
    k: Address,  # (T, K, Dh)
    ld_k: int,
    v: Address,  # (T, K, Dh)
    ld_v: int,
    bf16: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    bounds: Address,  # (S + 1,) int64
    prefix_of: Address,  # (S,) int64, or 0: no segment continues another
    num_segments: int,
    out: Address,  # (T, H, Dh), written
    wide_out: Address,  # (T, H, Dh) float32, written too, or 0
    m: Address,  # (T, H) float32, written: the largest score of each row
    share: Address,  # (T, H) float32, written: 1 over its sum of exp(score - m)
    level: str,  # auto, baseline, avx2, avx512; ValueError for one that this CPU does not have
    num_threads: int,
) -> None: ...
def attention_backward(
    q: Address,
    ld_q: int,
    k: Address,
    ld_k: int,
    v: Address,
    ld_v: int,
    bf16: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    bounds: Address,
    prefix_of: Address,
    num_segments: int,
    wide_out: Address,  # the output in float32, contiguous
    m: Address,
    share: Address,
    dout: Address,  # (T, H, Dh)
    ld_dout: int,
    dq: Address,  # (T, H, Dh), written
    dk: Address,  # (T, K, Dh), written
    dv: Address,  # (T, K, Dh), written
    level: str,
    num_threads: int,
) -> None: ...

# Called by kernels/paged_cache.py, paged_attention.py and sample.py, under the same rules.
def write_kv(
    keys: Address,  # tiled storage, see kernels/paged_cache.py
    values: Address,
    num_kv_heads: int,
    head_dim: int,
    bf16: bool,
    k: Address,  # (N, K, Dh), contiguous within a token
    ld_k: int,  # elements between two tokens
    v: Address,
    ld_v: int,
    slots: Address,  # (N,) int64
    num_tokens: int,
    num_threads: int,
) -> None: ...

class DecodeWorkspace:
    """Memory of decode attention: grows to what a call needs, then nothing is allocated. One call at a time."""

    def __init__(self) -> None: ...
    def attend(
        self,
        q: Address,  # (Nq, H, Dh) of the cache's dtype
        out: Address,  # (Nq, H, Dh), written
        num_heads: int,
        scale: float,
        keys: Address,
        values: Address,
        num_kv_heads: int,
        head_dim: int,
        bf16: bool,
        block_table: Address,  # (B, max_blocks) int32, as all that follow
        max_blocks: int,
        tails: Address,  # (B, 16), or 0: slots of the positions of a block -1
        block_size: int,  # a multiple of 16
        context_lens: Address,  # (B,)
        query_starts: Address,  # (B + 1,), or 0: one query a sequence
        group_starts: Address,  # (num_groups + 1,)
        shared_blocks: Address,  # (num_groups,)
        num_groups: int,
        level: str,  # auto, baseline, avx2, avx512; ValueError for one that this CPU does not have
        num_threads: int,
    ) -> None: ...

def sample(
    logits: Address,  # (B, V)
    ld: int,
    bf16: bool,
    num_rows: int,
    vocab_size: int,
    u: Address,  # (B,) float64
    temperature: Address,  # (B,) float32
    top_k: Address,  # (B,) int64
    top_p: Address,  # (B,) float32
    min_p: Address,  # (B,) float32
    tokens: Address,  # (B,) int64, written, as all that follow but the adjustments
    logprobs: Address,  # (B,) float32
    truncated_logprobs: Address,  # (B,) float32
    is_bad: Address,  # (B,) bool
    row_starts: Address,  # (B + 1,) int64 into the adjustments, or 0: none
    ids: Address,  # (M,) int64
    penalty: Address,  # (M,) float32
    bias: Address,  # (M,) float32
    given: Address,  # (B,) int64 tokens that stand instead of drawn ones, or 0
    entropies: Address,  # (B,) float32, or 0
    num_top: int,
    top_ids: Address,  # (B, num_top) int64
    top_logprobs: Address,  # (B, num_top) float32
    level: str,
    num_threads: int,
) -> None: ...

# The products of kernels/linear.py in float32; rows are contiguous, `ld` apart, levels those of the native_ functions.

def linear_forward(
    x: Address,  # (T, D)
    ld_x: int,
    num_tokens: int,
    weight: Address,  # (N, D)
    ld_weight: int,
    num_out: int,
    num_in: int,
    bias: Address,  # (N,) or 0
    y: Address,  # (T, N)
    level: str,
    num_threads: int,
) -> None: ...
def linear_forward_bf16(
    x: Address,  # (T, D), D even, as the weight and the rest in bfloat16
    ld_x: int,
    num_tokens: int,
    weight: Address,
    ld_weight: int,
    num_out: int,
    num_in: int,
    bias: Address,
    y: Address,
    level: str,
    num_threads: int,
) -> None: ...
def linear_dx(
    dy: Address,  # (T, N)
    ld_dy: int,
    num_tokens: int,
    weight: Address,
    ld_weight: int,
    num_out: int,
    num_in: int,
    dx: Address,  # (T, D)
    level: str,
    num_threads: int,
) -> None: ...
def linear_dweight(
    dy: Address,
    ld_dy: int,
    num_tokens: int,
    x: Address,
    ld_x: int,
    num_out: int,
    num_in: int,
    dweight: Address,  # (N, D)
    level: str,
    num_threads: int,
) -> None: ...

# The blocks between a layer's products, in float32 or bfloat16: kernels/rms_norm.py, rope.py, swiglu.py. Rows are contiguous.

def norm_forward(
    x: Address,  # (T, D)
    ld_x: int,
    delta: Address,  # (T, D) or 0: no sum
    ld_delta: int,
    weight: Address,
    eps: float,
    num_rows: int,
    dim: int,
    bf16: bool,
    sum: Address,  # (T, D), written if there is a delta
    y: Address,  # (T, D)
    level: str,  # auto, or baseline, avx2, avx512: the CPU must have it
    num_threads: int,
) -> None: ...
def norm_backward(
    dy: Address,  # (T, D)
    ld_dy: int,
    residual: Address,  # (T, D) or 0: the gradient of the sum by itself
    ld_residual: int,
    x: Address,  # (T, D), the sum
    ld_x: int,
    weight: Address,
    eps: float,
    num_rows: int,
    dim: int,
    bf16: bool,
    dx: Address,  # (T, D)
    dweight: Address,  # (D,)
    level: str,  # auto, or baseline, avx2, avx512: the CPU must have it
    num_threads: int,
) -> None: ...
def rope_forward(
    qkv: Address,  # (T, (H + 2 K) Dh)
    ld: int,
    rotations: Address,  # (T, 2 Dh) float32
    q_weight: Address,  # (Dh,) or 0: no norms
    k_weight: Address,
    eps: float,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,  # at most 1024
    bf16: bool,
    q: Address,  # (T, H, Dh)
    k: Address,  # (T, K, Dh)
    level: str,  # auto, or baseline, avx2, avx512: the CPU must have it
    num_threads: int,
) -> None: ...
def rope_backward(
    dq: tuple[Address, int, int],  # elements from token to token, from head to head
    dk: tuple[Address, int, int],
    dv: tuple[Address, int, int],
    qkv: Address,  # 0 where there are no norms
    ld: int,
    rotations: Address,
    q_weight: Address,
    k_weight: Address,
    eps: float,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,  # at most 1024
    bf16: bool,
    dqkv: Address,  # (T, (H + 2 K) Dh)
    dweight: Address,  # (2, Dh) or 0
    level: str,  # auto, or baseline, avx2, avx512: the CPU must have it
    num_threads: int,
) -> None: ...
def swiglu_forward(
    gate_up: Address,  # (T, 2 F)
    ld: int,
    num_rows: int,
    width: int,  # F
    bf16: bool,
    y: Address,  # (T, F)
    level: str,  # auto, or baseline, avx2, avx512: the CPU must have it
    num_threads: int,
) -> None: ...
def swiglu_backward(
    dy: Address,  # (T, F)
    ld_dy: int,
    gate_up: Address,
    ld: int,
    num_rows: int,
    width: int,
    bf16: bool,
    dgate_up: Address,  # (T, 2 F)
    level: str,  # auto, or baseline, avx2, avx512: the CPU must have it
    num_threads: int,
) -> None: ...

# What follows is called by rollout/native.py alone, on a CPU for which native_level says so. Rows of x are read in whole
# tiles: up to 32 rows and 32 columns beyond what is there must be readable, and finite.

class After:
    """What is done with a product: y = it, y += it, or y = silu(first half) * second half."""

    store: After
    add: After
    silu: After

class PackedLinearF32:
    """A weight (N, D), packed for y = x W^T + b. A row's result does not depend on the other rows."""

    num_bytes: int
    words_read: int  # words of 32 bits that are read of a row of x

    def __init__(
        self,
        weight: Address,
        ld: int,
        bias: Address,  # (N,) or 0: read where it lies, at every call
        num_out: int,
        num_in: int,
        halved: bool,  # for After.silu: the halves lie side by side
        num_threads: int,
    ) -> None: ...
    def run(
        self,
        x: Address,  # (R, D)
        ld_x: int,
        num_rows: int,
        y: Address,  # (R, N), or (R, N / 2) after silu
        ld_y: int,
        after: After,
        to_float32: bool,  # y is float32 whatever x is
        num_threads: int,
    ) -> None: ...

class PackedLinearBF16(PackedLinearF32):
    """In bfloat16, with AVX-512."""

class PackedLinearAMX(PackedLinearF32):
    """In bfloat16, with AMX, where native_level says so."""

class PackedLinearF32AVX2(PackedLinearF32):
    """With AVX2."""

class PackedLinearBF16AVX2(PackedLinearF32):
    """In bfloat16, with AVX2."""

class DecoderF32:
    """The decoder's forward over packed weights and a tiled cache, in memory that is kept.

    Weights, norms and the cache are read where they lie, at every call.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mlp_width: int,
        eps: float,
        embedding: Address,  # (V, D)
        ld_embedding: int,
        norm: Address,  # (D,), the final one
    ) -> None: ...
    def add_layer(
        self,
        attn_norm: Address,  # (D,)
        q_norm: Address,  # (Dh,) or 0
        k_norm: Address,
        mlp_norm: Address,
        qkv: PackedLinearF32,
        o: PackedLinearF32,
        gate_up: PackedLinearF32,  # halved
        down: PackedLinearF32,
        keys: Address,  # of the tiled cache, written
        values: Address,
        # A (R, D) of adapters: its weight above is then (N, D up to a multiple of 32 + R)
        qkv_a: PackedLinearF32 | None = None,
        o_a: PackedLinearF32 | None = None,
        gate_up_a: PackedLinearF32 | None = None,
        down_a: PackedLinearF32 | None = None,
    ) -> None: ...
    def run(
        self,
        tokens: Address,  # (N,) int64
        positions: Address,  # (N,) int64, below P
        slots: Address,  # (N,) int64: where keys and values go
        num_tokens: int,
        rotations: Address,  # (P, 2 Dh) float32: cos, then sin with its first half negated
        block_table: Address,  # int32 each, as in kernels.paged_attention.DecodePlan
        max_blocks: int,
        tails: Address,  # or 0
        block_size: int,
        context_lens: Address,
        query_starts: Address,  # or 0
        group_starts: Address,
        shared_blocks: Address,
        num_groups: int,
        hidden: Address,  # (N, D), written: after the final norm
        ld_hidden: int,
        num_threads: int,
    ) -> None: ...

class DecoderBF16(DecoderF32):
    """In bfloat16, with AVX-512."""

class DecoderAMX(DecoderF32):
    """In bfloat16, with AMX, where native_level says so."""

class DecoderF32AVX2(DecoderF32):
    """With AVX2."""

class DecoderBF16AVX2(DecoderF32):
    """In bfloat16, with AVX2."""

class Outcome:
    """Of a row's last token: stopped by a token, full by its limit; a bad one has none, its logits were not finite."""

    going: Outcome
    stopped: Outcome
    full: Outcome
    bad: Outcome

class DecodeLoopF32:
    """Decode steps of all running rows in one call: forward, head, draw, append."""

    def __init__(self, decoder: DecoderF32, head: PackedLinearF32, vocab_size: int) -> None: ...
    def run(
        self,
        # arrays over slots, those of rollout.rows.Rows; the first seven are written
        tokens: NDArray[np.int64],  # (S, L)
        logprobs: NDArray[np.float32],  # (S, L)
        truncated: NDArray[np.float32],  # (S, L)
        entropies: NDArray[np.float32] | None,  # (S, L)
        blocks: NDArray[np.int32],  # (S, M)
        tails: Tails | None,  # None: there are blocks for all positions
        length: NDArray[np.int64],  # (S,), as the rest
        num_blocks: NDArray[np.int64],
        prompt_length: NDArray[np.int64],
        limit: NDArray[np.int64],
        seed: NDArray[np.int64],
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int64],
        top_p: NDArray[np.float32],
        min_p: NDArray[np.float32],
        ignore_eos: NDArray[np.bool_],
        stop_ids: NDArray[np.int64],  # (S, n), -1: none
        is_eos: NDArray[np.bool_],  # (V,)
        # the batch, of rollout.rows.Batch
        slots: NDArray[np.int64],  # (B,)
        group_starts: NDArray[np.int32],  # (groups + 1,)
        shared_blocks: NDArray[np.int32],  # (groups,)
        allocator: BlockAllocator,
        rotations: Address,  # (P, 2 Dh) float32, P as long as a row may become
        max_steps: int,
        max_seconds: float,  # after which no step is begun
        num_threads: int,
    ) -> tuple[int, NDArray[np.uint8]]: ...  # steps made, (B,) Outcome of the last one

class DecodeLoopBF16(DecodeLoopF32):
    """In bfloat16, with AVX-512."""

class DecodeLoopAMX(DecodeLoopF32):
    """In bfloat16, with AMX."""

class DecodeLoopF32AVX2(DecodeLoopF32):
    """With AVX2."""

class DecodeLoopBF16AVX2(DecodeLoopF32):
    """In bfloat16, with AVX2."""
