"""Decode in padded buckets over fixed memory; a stand-in computes again what a CUDA graph would replay.

The tests marked `gpu` hold that graphs do what the stand-in does, and run by `pytest -m gpu`.
"""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from tiny import FAMILIES, SHAPE, has_fixed_sums, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from r1fast.kernels.advance import StepState, advance
from r1fast.kernels.paged_attention import DecodePlan, PagedLayout, paged_attention, write_kv
from r1fast.kernels.sample import Sampled
from r1fast.model import Decoder, ModelSpec
from r1fast.rollout import cuda_graphs, kv_cache, runner
from r1fast.rollout.cuda_graphs import Graph, row_ladder
from r1fast.rollout.decode_step import DecodeStep, Inputs
from r1fast.rollout.engine import Engine
from r1fast.rollout.kv_cache import KVCache
from r1fast.rollout.runner import Runner
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.rollout.speculation import Speculation

EOS = 3
LENGTHS = (40, 4, 33, 1, 70)  # some share blocks of 16, some do not


class Rerun:
    """Captures by keeping the callable. Like a graph, a replay reads and writes the captured memory."""

    def __init__(self):
        self.num_captured = self.num_replayed = 0

    def __call__(self, compute):
        result = compute().clone()
        self.num_captured += 1

        def replay():
            self.num_replayed += 1
            result.copy_(compute())

        return replay, result


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Blocks a row: 2, 4, 8 for a context of 128."""
    monkeypatch.setattr(cuda_graphs, "LEAST_POSITIONS", 32)


@pytest.fixture(params=["native", "model"])
def forward(request, monkeypatch):
    """The CPU's own forward, whose rows do not depend on padding; and the model's, as on a GPU."""
    if request.param == "native" and not has_fixed_sums():
        pytest.skip("needs AVX2")
    if request.param == "model":
        monkeypatch.setattr(runner, "is_supported", lambda model: False)
    return request.param


def make_prompts(lengths=LENGTHS) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(4, 97, (n,), generator=g).tolist() for n in lengths]


def make_engine(model, capture=None, *, slots=24, **options) -> Engine:
    engine = Engine(model, [EOS], max_batch_size=slots, **options)
    if capture is not None:
        engine.runner.use_graphs(slots, lambda: capture)
    return engine


def rollout(engine, prompts, sizes, max_tokens=30, temperature=1.0):
    """Completions of sizes[i] samples of prompt i."""
    seeds = [[sample_seed(p, g) for g in range(n)] for p, n in enumerate(sizes)]
    sampling = SamplingParams(temperature, max_tokens=max_tokens)
    groups = engine.generate(prompts, None, sampling, seeds=seeds)
    return [c for group in groups for c in group.completions]


def assert_equal(actual, expected, atol=None):
    """To the bit where a row's sums do not depend on padding, or within `atol`."""
    if atol is None:
        atol = 0.0 if has_fixed_sums() else 1e-5
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert a.token_ids == e.token_ids
        assert a.finish_reason == e.finish_reason
        np.testing.assert_allclose(a.logprobs, e.logprobs, rtol=0, atol=atol)


TOLERANCE = {"native": 0.0, "model": 1e-5}


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_eager_engine(family, forward):
    """Ragged groups with and without shared blocks; tables grow, samples end, slots are refilled."""
    model, sizes, buckets, reasons = tiny_model(family), (3, 1, 6, 4, 5), set(), set()
    for slots, prompts in ((24, make_prompts((20, 4, 12, 1, 17))), (7, make_prompts())):
        capture = Rerun()
        engine = make_engine(model, capture, slots=slots)
        expected = rollout(make_engine(model, slots=slots), prompts, sizes, 50)
        assert_equal(rollout(engine, prompts, sizes, 50), expected, TOLERANCE[forward])
        assert capture.num_captured == len(engine.runner.graphs.buckets)
        assert capture.num_replayed == engine.stats.decode_steps, "a step ran without a graph"
        buckets |= set(engine.runner.graphs.buckets)
        reasons |= {c.finish_reason for c in expected}
    assert reasons == {"stop", "length"}
    rows, widths, shared = (set(x) for x in zip(*buckets, strict=True))
    assert {7, 24} <= rows
    assert widths == {2, 4, 8}
    assert shared == {0, 2, 4}  # 4: 64 positions of the longest prompt


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 23, 24])
def test_every_edge_of_a_bucket(num_rows, forward):
    model = tiny_model()
    sizes = (num_rows - num_rows // 3, num_rows // 3)
    capture = Rerun()
    args = (make_prompts((40, 20)), sizes, 6, 0.7)
    actual = rollout(make_engine(model, capture), *args)
    assert_equal(actual, rollout(make_engine(model), *args), TOLERANCE[forward])
    assert capture.num_replayed > 0


def looks(engine) -> list[int]:
    """How many steps each call of the graphs makes, from now on."""
    found, draws = [], engine.runner.graphs.draws

    def counted(step, u, *args):
        found.append(len(u))
        return draws(step, u, *args)

    engine.runner.graphs.draws = counted
    return found


@pytest.mark.parametrize("stop_ids", [(), (5, 11, 40, 77)])
def test_the_host_looks_after_several_steps(stop_ids, forward):
    """Samples end amid them, by a token or their length: nothing drawn after that is seen, and slots are filled."""
    model, sampling = tiny_model(), SamplingParams(1.0, max_tokens=80, stop_token_ids=stop_ids)
    prompts, sizes = make_prompts((20, 4, 12, 1, 17)), (3, 1, 6, 4, 5)
    seeds = [[sample_seed(p, g) for g in range(n)] for p, n in enumerate(sizes)]
    capture = Rerun()
    engine, eager = make_engine(model, capture, slots=24), make_engine(model, slots=24)
    steps = looks(engine)
    groups, expected = (
        [c for group in e.generate(prompts, None, sampling, seeds=seeds) for c in group.completions]
        for e in (engine, eager)
    )
    assert_equal(groups, expected, TOLERANCE[forward])
    assert len({len(c.token_ids) for c in groups}) > 3
    assert max(steps) > 2
    assert sum(steps) == capture.num_replayed == engine.stats.decode_steps
    assert engine.stats.decode_tokens == eager.stats.decode_tokens
    assert engine.stats.blocks_used == 0


def test_all_steps_at_most_and_one_at_first():
    """A sixteenth of what has been drawn may be lost; near a limit there is one step at a time no more than left."""
    engine = make_engine(tiny_model(), Rerun(), slots=4)
    steps = looks(engine)
    sampling = SamplingParams(1.0, max_tokens=126, ignore_eos=True)
    engine.generate(make_prompts((2,)), 4, sampling)
    assert steps[0] == 1
    assert max(steps) == cuda_graphs.MAX_STEPS
    assert sum(steps) == 125  # the first token is of the prompt's own logits
    drawn = 1
    for n in steps:
        assert n <= 1 + drawn // 16
        drawn += n


def test_steps_ahead_preempt_nobody(forward):
    """Where blocks are short there is one step at a time, and the results are those of a roomy cache."""
    model = tiny_model()
    spec = model.spec
    block = 2 * spec.num_layers * spec.num_kv_heads * 16 * spec.head_dim * 4
    args = (make_prompts((20, 4)), (4, 4), 60)
    expected = rollout(make_engine(model), *args)
    capture = Rerun()
    engine = make_engine(model, capture, slots=8, cache_bytes=30 * block)
    steps = looks(engine)
    assert_equal(rollout(engine, *args), expected, TOLERANCE[forward])
    eager = make_engine(model, slots=8, cache_bytes=30 * block, cuda_graphs=False)
    assert_equal(rollout(eager, *args), expected, TOLERANCE[forward])
    assert 1 in steps[5:]
    assert capture.num_replayed == engine.stats.decode_steps


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"min_p": 0.1}, {"logit_bias": {5: 2.0}}, {"stop": ("x",)}], ids=str
)
def test_what_more_than_the_temperature_decides_is_drawn_by_the_host(options, forward):
    model, sampling = tiny_model(), SamplingParams(0.9, max_tokens=40, **options)
    capture = Rerun()
    engine = make_engine(model, capture, decode=lambda ids: "." * len(ids))
    steps = looks(engine)
    groups, expected = (
        [c for group in e.generate(make_prompts((20, 4)), 3, sampling) for c in group.completions]
        for e in (engine, make_engine(model, decode=lambda ids: "." * len(ids)))
    )
    assert_equal(groups, expected, TOLERANCE[forward])
    assert capture.num_replayed == engine.stats.decode_steps
    assert set(steps) == ({1} if "stop" in options else set())


def test_bad_logits_amid_several_steps_end_their_sample_alone(monkeypatch):
    """The weights cannot change amid them, so the logits of one row are spoilt at one position."""
    monkeypatch.setattr(runner, "is_supported", lambda model: False)
    model, sampling = tiny_model(), SamplingParams(1.0, max_tokens=75, ignore_eos=True)
    decode = Runner._decode

    def spoilt(self, inputs, plan, cache):
        logits = decode(self, inputs, plan, cache)
        return logits.masked_fill(
            ((inputs.positions == 90) & (inputs.slots >= 0))[:, None], torch.nan
        )

    monkeypatch.setattr(Runner, "_decode", spoilt)
    prompts = make_prompts((20, 2))
    engine = make_engine(model, Rerun(), slots=8)
    steps = looks(engine)
    events = [c for g in engine.generate(prompts, 2, sampling) for c in g.completions]
    long = events[:2]
    assert [c.finish_reason for c in long] == ["error"] * 2
    assert all(len(c.token_ids) == 71 for c in long), [len(c.token_ids) for c in long]
    assert max(steps) > 2
    assert engine.stats.blocks_used == 0


@pytest.mark.parametrize("block_size", [16, 32])
def test_advance_by_triton_and_by_torch(block_size, device):
    """Several steps of rows, of which some are padding, over a block's edge."""
    g = torch.Generator().manual_seed(0)
    R, M, K = 7, 6, 5
    context = torch.tensor([1, 14, 16, 31, 33, 0, 0]).int()
    table = torch.randperm(100, generator=g)[: R * M].int().view(R, M)
    first = {
        "step": torch.zeros(1, dtype=torch.int64), "tokens": torch.arange(R),
        "positions": (context - 1).clamp(min=0).long(), "slots": torch.full((R,), 999),
        "context": context, "table": table,
        "out_tokens": torch.full((K, R), -1), "out_logprobs": torch.zeros(K, R),
        "out_bad": torch.zeros(K, R, dtype=torch.uint8),
    }  # fmt: skip
    states = [StepState(**{n: x.clone().to(device) for n, x in first.items()}) for _ in range(2)]
    for _ in range(K):
        tokens = torch.randint(97, (R,), generator=g).to(device)
        logprobs = -torch.rand(R, generator=g).to(device)
        is_bad = (torch.rand(R, generator=g) < 0.3).to(device)
        drawn = Sampled(tokens, logprobs, logprobs, is_bad, None, None, None)
        for state, backend in zip(states, ("torch", "triton"), strict=True):
            advance(state, drawn, block_size, backend=backend)
    ref, kernel = states
    for name in first:
        assert torch.equal(getattr(ref, name), getattr(kernel, name)), name
    assert ref.step.item() == K
    assert ref.context.tolist() == [*(context[:5] + K).tolist(), 0, 0]
    assert ref.slots[5:].tolist() == [999, 999]
    position = int(context[1]) - 1 + K
    assert ref.slots[1] == table[1, position // block_size] * block_size + position % block_size
    assert torch.equal(ref.tokens[:5], ref.out_tokens[-1, :5])


def test_rows_beyond_the_ladder_run_without():
    model, capture = tiny_model(), Rerun()
    engine = make_engine(model, slots=24)
    engine.runner.use_graphs(4, lambda: capture)
    for prompts, sizes in ((make_prompts((40, 20)), (2, 2)), (make_prompts((40, 20)), (6, 6))):
        expected = rollout(make_engine(model), prompts, sizes, 12)
        assert_equal(rollout(engine, prompts, sizes, 12), expected)
    assert 0 < capture.num_replayed < engine.stats.decode_steps
    assert {rows for rows, *_ in engine.runner.graphs.buckets} <= {1, 2, 4}


def test_drafts_run_without():
    model, capture = tiny_model(), Rerun()
    options = {"speculation": Speculation(3, 1, 1)}
    args = (make_prompts(), (3, 1, 6, 4, 5))
    engine = make_engine(model, capture, **options)
    assert_equal(rollout(engine, *args), rollout(make_engine(model), *args))
    assert capture.num_captured == 0


def test_at_most_so_many_graphs(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    model, capture = tiny_model(), Rerun()
    engine = make_engine(model, capture)
    args = (make_prompts((20, 4, 12, 1, 17)), (3, 1, 6, 4, 5), 60)
    assert_equal(rollout(engine, *args), rollout(make_engine(model), *args))
    assert capture.num_captured == 2
    assert 0 < capture.num_replayed < engine.stats.decode_steps


def test_a_capture_that_fails_warns_once_and_is_not_tried_again():
    model, tried = tiny_model(), []

    def fail(compute):
        tried.append(compute)
        raise torch.cuda.OutOfMemoryError("no memory for a graph")

    engine = make_engine(model, fail)
    args = (make_prompts(), (3, 1, 6, 4, 5))
    expected = rollout(make_engine(model), *args)
    with pytest.warns(UserWarning, match="decoding without CUDA graphs: no memory") as caught:
        first = rollout(engine, *args)
    assert_equal(first, expected)
    assert_equal(rollout(engine, *args), expected)
    assert len(caught) == len(tried) == 1


def test_training_in_place_keeps_the_graphs_and_new_storage_drops_them(forward):
    model, capture = tiny_model(), Rerun()
    engine = make_engine(model, capture)
    args = (make_prompts(), (3, 1, 6, 4, 5))
    rollout(engine, *args, temperature=0.5)
    num_captured = capture.num_captured
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.8)
    expected = rollout(make_engine(model), *args, temperature=0.5)
    buckets = set(engine.runner.graphs.buckets)
    assert_equal(rollout(engine, *args, temperature=0.5), expected, TOLERANCE[forward])
    assert capture.num_captured - num_captured == len(engine.runner.graphs.buckets) - len(buckets)
    assert buckets <= set(engine.runner.graphs.buckets)
    model.norm.weight.data = model.norm.weight.data.clone()
    num_captured = capture.num_captured
    assert_equal(rollout(engine, *args, temperature=0.5), expected, TOLERANCE[forward])
    assert capture.num_captured - num_captured == len(engine.runner.graphs.buckets) > 0


def test_a_new_cache_drops_the_graphs():
    model, capture = tiny_model(), Rerun()
    engine = make_engine(model, capture)
    args = (make_prompts(), (3, 1, 6, 4, 5))
    expected = rollout(engine, *args)
    engine.scheduler = None
    num_captured = capture.num_captured
    assert_equal(rollout(engine, *args), expected)
    assert capture.num_captured == 2 * num_captured


def test_an_engine_that_is_dropped_gives_its_cache_back_at_once():
    """No cycle through the graphs, which on a GPU would keep gigabytes until the next collection."""
    model = tiny_model()

    def keep_result_alone(compute):
        return (lambda: None), compute().clone()

    engine = make_engine(model, keep_result_alone)
    rollout(engine, make_prompts((40,)), (2,), 5)
    cache = weakref.ref(engine.scheduler.cache)
    assert engine.runner.graphs.buckets
    gc.disable()
    try:
        del engine
        assert cache() is None
    finally:
        gc.enable()


def test_no_graphs_on_a_cpu():
    assert Engine(tiny_model(), [EOS], cuda_graphs=True).runner.graphs is None


@pytest.mark.parametrize("most", [1, 2, 3, 16, 17, 24, 25, 100, 256])
def test_the_ladder_has_no_large_steps(most):
    ladder = row_ladder(most)
    assert ladder == sorted(set(ladder))
    assert ladder[-1] == most
    for n in range(1, most + 1):
        rung = next(r for r in ladder if r >= n)
        assert rung < (2 * n if n < 16 else 1.5 * n) or rung == n, (n, rung)
    assert len(row_ladder(256)) == 13


def step_of(sizes, shared, context, block_size=16) -> DecodeStep:
    B = len(context)
    table = np.arange(1, 1 + B * 4, dtype=np.int32).reshape(B, 4)
    starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    positions = np.array(context) - 1
    return DecodeStep(
        np.arange(B) + 5, positions, table[:, 0] * 16 + positions, table, np.array(context),
        starts, np.array(shared, np.int32), None,
    )  # fmt: skip


def test_padding_is_apart_from_the_rows():
    """After a fuller step too: what a bucket held before does not show."""
    graph = Graph((8, 6, 4), 99, torch.device("cpu"))
    for sizes, shared, context in (
        ([1] * 8, [0] * 8, [60] * 8),
        ([3, 2], [2, 0], [40, 41, 50, 1, 17]),
        ([8], [1], [20] * 8),
        ([1], [0], [3]),
    ):
        step = step_of(sizes, shared, context)
        graph.fill(step)
        B, plan, inputs = len(context), graph.plan, graph.inputs
        assert plan.context_lens.tolist() == [*context, *[0] * (8 - B)]
        assert inputs.tokens.tolist() == [*step.tokens, *[0] * (8 - B)]
        assert inputs.positions.tolist() == [*step.positions, *[0] * (8 - B)]
        assert inputs.slots.tolist() == [*step.slots, *[99] * (8 - B)]
        assert torch.equal(plan.block_table[:B, :4], torch.from_numpy(step.table))
        bounds, blocks = plan.group_starts.tolist(), plan.shared_blocks.tolist()
        assert (len(bounds), len(blocks)) == (9, 8)
        assert bounds == sorted(bounds)
        assert bounds[: len(sizes) + 1] == step.group_starts.tolist()
        assert bounds[-1] == 8
        assert blocks == [*shared, *[0] * (8 - len(sizes))]


def test_padding_writes_to_the_scratch_slot_alone():
    """Blocks that the sequences do not hold stay as they were: NaN, which conftest makes of fresh memory."""
    model = tiny_model()
    engine = make_engine(model, Rerun(), cache_bytes=60 * 2 * 2 * 2 * 16 * 8 * 4)
    rollout(engine, make_prompts((40,)), (5,), 20)
    cache = engine.scheduler.cache
    assert (cache.num_blocks, cache.scratch_slot) == (60, 960)
    keys, _ = cache.layers[0]
    written = ~keys.isnan().flatten(1).all(1)
    assert written[-1], "three rows of padding have written nowhere"
    assert written[:-1].sum() <= engine.stats.peak_blocks


def test_room_that_is_not_used_changes_no_bit_of_the_triton_kernel(monkeypatch):
    """More rows, groups, blocks and shared blocks than a step has."""
    g = torch.Generator().manual_seed(0)
    layout = PagedLayout(2, 32, 16, kind="rows")
    keys, values = (x.normal_(generator=g) for x in layout.allocate(160))
    context, sizes, shared = [530, 600, 70, 33], [2, 2], [32, 2]
    table = torch.randperm(160, generator=g)[:160].int().view(4, 40)
    table[1, :32], table[3, :2] = table[0, :32], table[2, :2]
    starts = torch.tensor([0, 2, 4]).int()
    plan = DecodePlan(table, torch.tensor(context).int(), starts, torch.tensor(shared).int())
    plan.max_shared_blocks = 32
    step = DecodeStep(
        *(np.zeros(4, np.int64) for _ in range(3)), table.numpy(), np.array(context),
        starts.numpy(), np.array(shared, np.int32), None,
    )  # fmt: skip
    graph = Graph((6, 80, 64), 0, torch.device("cpu"))
    graph.fill(step)
    q = torch.randn(6, 4, 32, generator=g)
    q[4:] = torch.nan
    attend = partial(paged_attention, layout=layout, keys=keys, values=values, backend="triton")
    padded = attend(q, plan=graph.plan)
    assert torch.equal(padded[:4], attend(q[:4], plan=plan))
    assert (padded[4:] == 0).all()
    assert sizes == np.diff(starts).tolist()


def take_triton(monkeypatch):
    monkeypatch.setattr(runner, "paged_attention", partial(paged_attention, backend="triton"))
    monkeypatch.setattr(kv_cache, "write_kv", partial(write_kv, backend="triton"))


def test_with_the_triton_kernels(monkeypatch):
    """The engine's whole decode path as a GPU takes it."""
    monkeypatch.setattr(runner, "is_supported", lambda model: False)
    monkeypatch.setattr(kv_cache, "PagedLayout", partial(PagedLayout, kind="rows"))
    args = (tiny_model(num_hidden_layers=1), make_prompts((20, 3)), (2, 1), 4)

    def run(capture):
        model, *rest = args
        return rollout(make_engine(model, capture, slots=4), *rest)

    expected = run(None)
    take_triton(monkeypatch)
    assert_equal(run(None), expected, 1e-5)
    capture = Rerun()
    assert_equal(run(capture), expected, 1e-5)
    assert capture.num_replayed > 0


class NoHost(TorchDispatchMode):
    """Refuses operators that bring values to a graph from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in torch.utils._pytree.tree_leaves((args, kwargs)):
            assert not torch.is_tensor(x) or x.is_meta, f"{func} reads memory of the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_asks_no_value_of_the_device(family, monkeypatch):
    """On tensors without values, which refuse .item(), .tolist() and boolean indices as a capture does."""
    from r1fast.kernels import triton_paged_attention

    launches = []

    class Launch:
        def __getitem__(self, grid):
            assert all(type(n) is int and n > 0 for n in grid), grid
            return lambda *args, **constants: launches.append(grid)

    for name in ("_partial_kernel", "_merge_kernel", "_write_kernel"):
        monkeypatch.setattr(triton_paged_attention, name, Launch())
    take_triton(monkeypatch)
    spec, device = ModelSpec.from_hf_config(SHAPE | FAMILIES[family]), torch.device("meta")
    with torch.inference_mode():
        model = Decoder(spec, device=device, dtype=torch.bfloat16)
        cache = KVCache(
            spec, torch.bfloat16, device,
            block_size=16, num_bytes=1 << 20, max_sequences=8, max_positions=128,
        )  # fmt: skip
        longs = (torch.zeros(8, dtype=torch.int64, device=device) for _ in range(3))
        shapes = (8, 4), (8,), (9,), (8,)
        ints = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes)
        inputs, plan = Inputs(*longs), DecodePlan(*ints, max_shared_blocks=2)
        step = partial(Runner(model)._decode, inputs, plan, cache)
        step()  # a model makes what it keeps on the device
        launches.clear()
        with NoHost():
            logits = step()
    assert logits.shape == (8, 97)
    assert len(launches) == 4 * spec.num_layers


GPU = pytest.mark.gpu
ON_GPU = (make_prompts(), (3, 1, 6, 4, 5), 50)


def gpu_model(dtype=torch.float32) -> Decoder:
    return tiny_model("qwen3").to("cuda", dtype)


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_do_what_the_stand_in_does(dtype):
    """The same kernels over the same memory, started another way."""
    model, capture = gpu_model(dtype), Rerun()
    engine, stand_in = make_engine(model, slots=7), make_engine(model, capture, slots=7)
    for _ in range(2):  # captured, then replayed alone
        assert_equal(rollout(engine, *ON_GPU), rollout(stand_in, *ON_GPU), 1e-5)
    assert set(engine.runner.graphs.buckets) == set(stand_in.runner.graphs.buckets)
    assert capture.num_replayed == engine.stats.decode_steps


@GPU
def test_graphs_agree_with_the_eager_engine():
    model = gpu_model()
    eager = make_engine(model, cuda_graphs=False)
    assert eager.runner.graphs is None
    engine = make_engine(model)
    assert_equal(rollout(engine, *ON_GPU), rollout(eager, *ON_GPU), 1e-4)
    assert engine.runner.graphs.can_capture


@GPU
def test_graphs_read_the_weights_as_they_are():
    model = gpu_model()
    engine = make_engine(model)
    rollout(engine, *ON_GPU)
    buckets = set(engine.runner.graphs.buckets)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.8)
    expected = rollout(make_engine(model, cuda_graphs=False), *ON_GPU)
    assert_equal(rollout(engine, *ON_GPU), expected, 1e-4)
    assert buckets <= set(engine.runner.graphs.buckets)
    model.norm.weight.data = 1 * model.norm.weight.data
    assert_equal(rollout(engine, *ON_GPU), expected, 1e-4)


@GPU
def test_a_graph_that_cannot_be_captured_leaves_the_engine_working():
    model = gpu_model()
    stream = torch.cuda.current_stream()

    def waits(compute):
        """Asks a value of the device, which a capture refuses."""

        def compute_and_wait():
            result = compute()
            assert result.isfinite().all().item()
            return result

        return cuda_graphs.CudaCapture(torch.device("cuda"))(compute_and_wait)

    engine = make_engine(model, waits)
    with pytest.warns(UserWarning, match="decoding without CUDA graphs"):
        actual = rollout(engine, *ON_GPU)
    assert torch.cuda.current_stream() == stream
    assert_equal(actual, rollout(make_engine(model, cuda_graphs=False), *ON_GPU), 1e-4)
