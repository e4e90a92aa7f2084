"""What the GPU is told of a step, against the step itself: random rows, adapters and lengths."""

import contextlib
import types
from dataclasses import replace

import pytest
import torch
from fake_cuda import FakeCuda
from hypothesis import given, settings
from hypothesis import strategies as st
from npc_kernels.gpu_plan import BUCKETS, CHUNK, PAGE_CLASSES, PLANES, plan, room
from test_gpu import BLOCK_SIZE, make_batch

CONTEXT = 10 * CHUNK + 8
TABLE = torch.zeros(CONTEXT, 2)
POOL = torch.zeros(16, 1)

ADAPTERS = st.sampled_from([(), (3,), (5,), (1, 2), (9, 8, 7), (4, 6, 10, 11), tuple(range(8))])
LENGTHS = st.one_of(st.integers(1, 3 * CHUNK), st.integers(1, CONTEXT))


ROWS = st.lists(st.tuples(LENGTHS, ADAPTERS), min_size=1, max_size=64)


def decode_step(rows):
    return make_batch([(seen - 1, seen) for seen, _ in rows], [pages for _, pages in rows], POOL)


@st.composite
def mixed_steps(draw):
    rows = draw(st.lists(st.tuples(LENGTHS, st.integers(1, 40), ADAPTERS), max_size=12))
    rows.sort(key=lambda row: row[1] > 1)  # rows of one token first
    spans = [(max(seen - length, 0), seen) for seen, length, _ in rows]
    spans.sort(key=lambda span: span[1] - span[0] > 1)
    return make_batch(spans, [pages for *_, pages in rows], POOL)


def check(step, batch, planned):
    """Every token is in one segment, with its own pages, and in one tile, of its own row."""
    owners = [row for row in range(batch.num_rows) for _ in range(batch.row_starts[row], batch.row_starts[row + 1])]
    placed = []
    for tokens, pages in zip(step.tokens.tolist(), step.pages.tolist(), strict=True):
        tokens = [token for token in tokens if token >= 0]
        placed += tokens
        for token in tokens:
            assert tuple(page for page in pages if page >= 0) == batch.lora.pages[owners[token]]
        assert tokens or set(pages) <= {-1}, "a segment of nobody has no pages"
    assert sorted(placed) == list(range(len(owners)))
    attended = []
    for row, first, count in step.tiles.tolist():
        assert count <= planned.tile_queries
        assert all(owners[token] == row for token in range(first, first + count))
        attended += range(first, first + count)
    assert sorted(attended) == list(range(len(owners)))
    for name in ("token_ids", "sampled", "positions", "kv_slots"):
        given_numbers, part = getattr(batch, name), getattr(step, name)
        assert torch.equal(part[: len(given_numbers)].long(), given_numbers)
        assert not part[len(given_numbers) :].any()
    rows, blocks = batch.block_tables.shape
    assert torch.equal(step.tables[:rows, :blocks].long(), batch.block_tables)
    assert planned.num_planes == PLANES or planned.num_planes * CHUNK >= batch.max_seen
    assert all(part.data_ptr() % 16 == 0 for part in step)


@settings(deadline=None, max_examples=60)
@given(mixed_steps())
def test_a_step_is_told_as_it_is(batch):
    planned = plan(batch, TABLE, TABLE)
    check(planned.step, batch, planned)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.data())
def test_a_graph_is_told_of_any_step_that_it_has_room_for(rows, data):
    """Its memory is filled with one step and then with another: nothing of the first is left but unread tables."""
    largest = [(max(seen for seen, _ in rows), max((pages for _, pages in rows), key=len))]
    first = decode_step(rows + largest if len(rows) < BUCKETS[-1] else rows)
    found = room(first)
    planned = plan(first, TABLE, TABLE, room=found)
    check(planned.step, first, planned)
    smallest = max([0, *(size for size in BUCKETS if size < found.num_rows)]) + 1
    others = data.draw(st.lists(st.sampled_from(rows), min_size=smallest - 1, max_size=found.num_rows - 1))
    second = decode_step(data.draw(st.permutations(others + largest)))
    assert room(second) == found
    planned.refill(second)
    check(planned.step, second, planned)
    assert planned.num_tokens == found.num_rows
    assert planned.step.tables.shape == (
        found.num_rows,
        -(-(CONTEXT if found.num_planes == PLANES else found.num_planes * CHUNK) // BLOCK_SIZE),
    )


@settings(deadline=None, max_examples=100)
@given(ROWS)
def test_rooms_are_the_smallest(rows):
    """Of ten numbers of rows, four of pages, and powers of two of planes."""
    batch = decode_step(rows)
    found = room(batch)
    most = max(map(len, batch.lora.pages))
    assert found.num_rows == min(size for size in BUCKETS if size >= batch.num_rows)
    assert found.max_pages == min(size for size in PAGE_CLASSES if size >= most)
    planes = min(-(-batch.max_seen // CHUNK), PLANES)
    assert found.num_planes in (1, 2, 4, 8)
    assert found.num_planes / 2 < planes <= found.num_planes


def test_steps_that_no_graph_serves():
    assert room(make_batch([(0, 5)])) is None, "a prompt"
    assert room(make_batch([(4, 5)] * 65)) is None, "more rows than the largest graph"
    assert room(make_batch([(4, 5)], [tuple(range(9))], POOL)) is None, "an adapter of nine pages"
    assert room(make_batch([(4, 5)] * 2, sampled=torch.tensor([1]))) is None, "somebody who is not sampled"
    assert room(make_batch([])) is None


@pytest.mark.parametrize("has_own_stream", [True, False])
def test_a_graph_is_captured_on_the_stream_that_it_will_be_replayed_on(monkeypatch, has_own_stream):
    """Its kernels keep that stream's priority. The default stream cannot be captured: there torch takes another."""
    cuda, captured = FakeCuda(monkeypatch), []

    @contextlib.contextmanager
    def graph(recorded, *, pool, stream, capture_error_mode):
        captured.append((stream, pool, capture_error_mode))
        yield

    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: computed.append("replay"))
    )
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    batch, computed = decode_step([(5, ()), (9, ())]), []
    planned = plan(batch, TABLE, TABLE, room=room(batch))
    on_gpu = replace(planned, packed=types.SimpleNamespace(device=torch.device("cuda:0")))
    own = torch.cuda.Stream(priority=0) if has_own_stream else None
    with cuda.use(own):
        run = on_gpu.record(lambda: computed.append(cuda.current) or torch.zeros(2, 3))
        assert run().shape == (2, 3)
    assert captured == [(own, "a pool", "thread_local")]
    assert computed == [own or cuda.default] * 2 + ["replay"]
