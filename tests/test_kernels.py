"""Every kernel gives the bits of scalar.c, on odd sizes, without touching a byte past its operands; and scalar.c gives
the numbers of docs/format.md computed in numpy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from guarded import guarded

from mobiquant.packing import GROUP_SIZE, groups_of, pack_plane, pack_scale_offset, tiles_of
from runtime.native import ffi, kernels, lib

SCALAR = lib.mq_kernels_find(b"scalar")
FAST = [kernel.name for kernel in kernels() if kernel.supported and kernel.name != "scalar"]
LANES = 16
SHAPES = [(1, 1), (16, 128), (17, 130), (40, 384), (33, 2200)]


@pytest.fixture(params=FAST)
def fast(request: pytest.FixtureRequest):
    return lib.mq_kernels_find(request.param.encode())


def pointer(array: np.ndarray, kind: str):
    return ffi.cast(f"{kind} *", ffi.from_buffer(array))


def random_linear(rows: int, columns: int, seed: int) -> SimpleNamespace:
    """A random linear as the file holds it, with its codes, scales and offsets."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    scales = rng.uniform(1e-3, 0.1, (rows, groups_of(columns))).astype(np.float16)
    offsets = rng.uniform(-0.1, 0.2, scales.shape).astype(np.float16)
    planes = [guarded(pack_plane(codes, index)) for index in (1, 2, 3, 4)]
    scale_offset = guarded(pack_scale_offset(scales, offsets))
    matrix = ffi.new("mq_matrix *")
    matrix.plane = [pointer(plane, "uint8_t") for plane in planes]
    matrix.scale_offset = pointer(scale_offset, "uint16_t")
    matrix.rows, matrix.columns = rows, columns
    matrix.tiles, matrix.groups = tiles_of(rows), groups_of(columns)
    return SimpleNamespace(
        codes=codes,
        scales=scales,
        offsets=offsets,
        matrix=matrix,
        keep=(planes, scale_offset),
        rows=rows,
        columns=columns,
    )


def quantize(table, x: np.ndarray) -> SimpleNamespace:
    """Quantise the tokens of x [n, columns] with one table."""
    n, columns = x.shape
    groups = groups_of(columns)
    q = guarded(np.full((n, groups * GROUP_SIZE), 99, np.int8))
    scale = guarded(np.full((n, groups), np.nan, np.float32))
    total = guarded(np.full((n, groups), np.nan, np.float32))
    squares = np.zeros(n, np.float32)
    for token in range(n):
        row = guarded(x[token])
        squares[token] = table.quantize(
            pointer(row, "float"),
            columns,
            pointer(q[token], "int8_t"),
            pointer(scale[token], "float"),
            pointer(total[token], "float"),
        )
    return SimpleNamespace(q=q, scale=scale, sum=total, squares=squares, groups=groups)


def matvec(
    table, linear: SimpleNamespace, depth: int, x: SimpleNamespace, token: int, tiles: tuple[int, int]
) -> np.ndarray:
    y = guarded(np.full(linear.rows, 7.0, np.float32))
    table.matvec(
        linear.matrix,
        depth,
        pointer(x.q[token], "int8_t"),
        pointer(x.scale[token], "float"),
        pointer(x.sum[token], "float"),
        *tiles,
        pointer(y, "float"),
    )
    return y


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_scalar_matvec_is_the_formula_of_the_format(rows: int, columns: int, depth: int) -> None:
    linear = random_linear(rows, columns, seed=rows)
    x = np.random.default_rng(1).normal(size=(1, columns)).astype(np.float32)
    quantized = quantize(SCALAR, x)
    restored = (quantized.q[0].astype(np.float64) * np.repeat(quantized.scale[0], GROUP_SIZE))[:columns]
    step = np.repeat(linear.scales.astype(np.float64), GROUP_SIZE, axis=1)[:, :columns] * 4.0 ** (1 - depth)
    offset = np.repeat(linear.offsets.astype(np.float64), GROUP_SIZE, axis=1)[:, :columns]
    expected = (step * ((linear.codes >> (8 - 2 * depth)) + 0.5) - offset) @ restored
    y = matvec(SCALAR, linear, depth, quantized, 0, (0, linear.matrix.tiles))
    assert np.sum((y - expected) ** 2) <= 1e-10 * np.sum(expected**2)
    assert np.abs(restored - x[0]).max() <= np.abs(x).max() / 127 * 0.5001


@pytest.mark.parametrize("columns", [1, 16, 100, 128, 129, 300, 2048])
def test_quantize_gives_the_same_codes(fast, columns: int) -> None:
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(6, columns)).astype(np.float32) * np.float32(10.0) ** rng.integers(-8, 8, (6, 1))
    x[1] = 0
    x[2] = 1e-38
    x[3, : columns // 2] = np.round(x[3, : columns // 2])
    ours, expected = quantize(fast, x.astype(np.float32)), quantize(SCALAR, x.astype(np.float32))
    for part in ("q", "scale", "sum", "squares"):
        assert same_bits(getattr(ours, part), getattr(expected, part)), part


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_keeps_codes_in_range_on_values_that_are_not_finite(fast, bad: float) -> None:
    x = np.ones((1, 200), np.float32)
    x[0, 150] = bad
    for table in (fast, SCALAR):
        assert np.abs(quantize(table, x).q.astype(np.int32)).max() <= 127


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_matvec_gives_the_same_bits(fast, rows: int, columns: int, depth: int) -> None:
    linear = random_linear(rows, columns, seed=columns)
    x = quantize(SCALAR, np.random.default_rng(2).normal(size=(1, columns)).astype(np.float32))
    for tiles in ((0, linear.matrix.tiles), (linear.matrix.tiles - 1, linear.matrix.tiles), (0, 0)):
        assert same_bits(matvec(fast, linear, depth, x, 0, tiles), matvec(SCALAR, linear, depth, x, 0, tiles))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_extreme_codes_and_activations_do_not_saturate(fast, depth: int) -> None:
    linear = random_linear(16, 256, seed=0)
    for index, plane in enumerate(linear.keep[0]):
        plane[...] = pack_plane(np.full((16, 256), 255, np.uint8), index + 1)
    for sign in (1, -1):
        x = quantize(SCALAR, np.full((1, 256), sign, np.float32))
        tiles = (0, linear.matrix.tiles)
        assert same_bits(matvec(fast, linear, depth, x, 0, tiles), matvec(SCALAR, linear, depth, x, 0, tiles))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_matmat_gives_the_bits_of_one_matvec_per_token(fast, rows: int, columns: int, depth: int) -> None:
    n = 37
    linear = random_linear(rows, columns, seed=columns)
    x = quantize(SCALAR, np.random.default_rng(3).normal(size=(n, columns)).astype(np.float32))
    activations = ffi.new("mq_activations *")
    activations.q, activations.groups = pointer(x.q, "int8_t"), x.groups
    activations.scale, activations.sum = pointer(x.scale, "float"), pointer(x.sum, "float")
    tiles = (0, linear.matrix.tiles)
    expected = np.stack([matvec(SCALAR, linear, depth, x, token, tiles) for token in range(n)])
    for count in (1, 2, 5, 16, 19, n):
        chosen = np.random.default_rng(count).permutation(n)[:count].astype(np.uint32)
        for table in (fast, SCALAR):
            y = guarded(np.full((n, rows + 3), 7.0, np.float32))
            token = guarded(chosen)
            tokens = pointer(token, "uint32_t")
            table.matmat(linear.matrix, depth, activations, tokens, count, *tiles, pointer(y, "float"), rows + 3)
            assert same_bits(y[chosen, :rows], expected[chosen])
            y[chosen, :rows] = 7.0
            assert (y == 7.0).all(), "wrote outside its rows or tokens"


@pytest.mark.parametrize("n_hidden", [1, 5, 16])
@pytest.mark.parametrize("columns", [64, 384])
def test_router_hidden_gives_the_same_bits(fast, n_hidden: int, columns: int) -> None:
    rng = np.random.default_rng(n_hidden)
    x = quantize(SCALAR, rng.normal(size=(1, columns)).astype(np.float32))
    hidden = guarded(rng.integers(-127, 128, (n_hidden, x.groups * GROUP_SIZE)).astype(np.int8))
    results = []
    for table in (fast, SCALAR):
        out = guarded(np.zeros(n_hidden, np.float32))
        q, scale = pointer(x.q[0], "int8_t"), pointer(x.scale[0], "float")
        table.router_hidden(pointer(hidden, "int8_t"), n_hidden, q, scale, x.groups, pointer(out, "float"))
        results.append(out)
    assert same_bits(*results)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 512])
def test_rmsnorm_swiglu_add_and_f16_give_the_same_bits(fast, n: int) -> None:
    rng = np.random.default_rng(n)
    x, weight = (rng.normal(size=n).astype(np.float32) * 4 for _ in range(2))
    x[: min(n, 6)] = np.array([0, -0.0, 200, -200, 1e-30, 70000], np.float32)[: min(n, 6)]

    def run(table) -> list[np.ndarray]:
        normed, gate, total = (guarded(values) for values in (np.zeros(n, np.float32), x, x))
        source, other = guarded(x), guarded(weight)
        half = guarded(np.zeros(n, np.uint16))
        table.rmsnorm(pointer(source, "float"), pointer(other, "float"), n, 1e-5, pointer(normed, "float"))
        table.swiglu(pointer(gate, "float"), pointer(other, "float"), n)
        table.add(pointer(total, "float"), pointer(other, "float"), n)
        table.to_f16(pointer(source, "float"), pointer(half, "uint16_t"), n)
        return [normed, gate, total, half]

    ours, expected = run(fast), run(SCALAR)
    assert all(same_bits(a, b) for a, b in zip(ours, expected, strict=True))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(expected[0], wide / np.sqrt((wide**2).mean() + 1e-5) * weight, rtol=2e-6, atol=1e-30)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(expected[1], wide / (1 + np.exp(-wide)) * weight, rtol=2e-6, atol=1e-30)
        assert same_bits(expected[3], x.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 128])
def test_rope_gives_the_same_bits(fast, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    head = rng.normal(size=head_dim).astype(np.float32)
    angle = rng.uniform(0, 100, head_dim // 2)
    cosine, sine = guarded(np.cos(angle).astype(np.float32)), guarded(np.sin(angle).astype(np.float32))
    results = []
    for table in (fast, SCALAR):
        rotated = guarded(head)
        table.rope(pointer(rotated, "float"), pointer(cosine, "float"), pointer(sine, "float"), head_dim)
        results.append(rotated)
    assert same_bits(*results)
    low, high = np.split(head.astype(np.float64), 2)
    expected = np.concatenate([low * cosine - high * sine, high * cosine + low * sine])
    np.testing.assert_allclose(results[1], expected, rtol=1e-5, atol=1e-6)


# Keys or values of a chunk: f16 [positions, head_dim], or int8 with the f16 scale of every 32 dimensions.
Stored = np.ndarray | tuple[np.ndarray, np.ndarray]


def attend(
    table, query: np.ndarray, key: Stored, value: Stored, seen: int, scale: float, window: int = 0
) -> np.ndarray:
    """The parts of queries [tokens, heads, head_dim] over one chunk."""
    tokens, heads, head_dim = query.shape
    padding = -head_dim % LANES
    stored, operands = ffi.new("mq_stored *"), [guarded(query)]
    for name, numbers in (("key", key), ("value", value)):
        if isinstance(numbers, tuple):
            numbers, scales = numbers
            operands.append(guarded(blocked(scales) if name == "key" else scales))
            setattr(stored, f"{name}_scale", pointer(operands[-1], "uint16_t"))
        operands.append(guarded(blocked(numbers) if name == "key" else np.pad(numbers, ((0, 0), (0, padding)))))
        setattr(stored, name, pointer(operands[-1], "void"))
    part = guarded(np.zeros((tokens, heads, head_dim + padding + LANES), np.float32))
    queries = ffi.new("mq_queries *")
    queries.query, queries.tokens, queries.heads = pointer(operands[0], "float"), tokens, heads
    queries.token_stride, queries.head_dim, queries.scale = heads * head_dim, head_dim, scale
    queries.window = window
    table.attend(queries, seen, stored, pointer(part, "float"))
    return part


def blocked(rows: np.ndarray) -> np.ndarray:
    """Keys, or their scales, [positions, n] as attention reads them: [positions / 16, n, 16]."""
    return np.pad(rows, ((0, -len(rows) % LANES), (0, 0))).reshape(-1, LANES, rows.shape[1]).transpose(0, 2, 1)


def softmax_of(part: np.ndarray, head_dim: int) -> np.ndarray:
    """What a part says once it is complete."""
    total = -(-head_dim // LANES) * LANES
    return part[..., :head_dim] / part[..., total : total + 1]


def softmax_reference(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
    """In float64, query [..., head_dim] over all positions."""
    logits = query.astype(np.float64) @ key.astype(np.float64).T * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights @ value.astype(np.float64) / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("head_dim", [16, 36, 64, 80, 128])
@pytest.mark.parametrize("positions", [1, 2, 15, 17, 48, 130, 256])
def test_attention_gives_the_same_bits_and_each_token_sees_its_past(fast, positions: int, head_dim: int) -> None:
    rng = np.random.default_rng(positions)
    key, value = (rng.normal(size=(positions, head_dim)).astype(np.float16) for _ in range(2))
    for tokens, heads in ((1, 1), (1, 4), (min(positions, 3), 5), (min(positions, 8), 2)):
        query = rng.normal(size=(tokens, heads, head_dim)).astype(np.float32) * 3
        seen = positions - tokens + 1
        parts = [attend(table, query, key, value, seen, 0.125) for table in (fast, SCALAR)]
        assert same_bits(*parts)
        for token in range(tokens):
            past = slice(0, seen + token)
            expected = softmax_reference(query[token], key[past], value[past], 0.125)
            np.testing.assert_allclose(softmax_of(parts[1][token], head_dim), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [36, 64, 128])
@pytest.mark.parametrize("window", [1, 3, 17, 100, 255])
def test_attention_in_a_window_sees_its_last_positions_alone(fast, window: int, head_dim: int) -> None:
    """What has left the window may be anything: in a ring other positions lie there."""
    rng = np.random.default_rng(window)
    for positions, behind in ((256, 0), (256, min(window, 9) - 1), (200, 0), (131, 0)):
        key, value = (rng.normal(size=(positions, head_dim)).astype(np.float16) for _ in range(2))
        for tokens, heads in ((1, 1), (1, 4), (3, 5), (8, 2), (7, 1)):
            seen = positions + behind - tokens + 1  # of the first token; the last one's window may begin at the end
            first = max(0, seen - window)
            key[:first], value[:first] = np.nan, np.inf
            query = rng.normal(size=(tokens, heads, head_dim)).astype(np.float32) * 3
            parts = [attend(table, query, key, value, seen, 0.125, window) for table in (fast, SCALAR)]
            assert same_bits(*parts)
            for token in range(tokens):
                visible = slice(max(0, seen + token - window), min(seen + token, positions))
                expected = softmax_reference(query[token], key[visible], value[visible], 0.125)
                np.testing.assert_allclose(softmax_of(parts[1][token], head_dim), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 36, 64, 80, 128])
@pytest.mark.parametrize("positions", [1, 17, 130, 256])
def test_attention_over_int8_is_that_over_the_numbers_they_stand_for(fast, positions: int, head_dim: int) -> None:
    rng = np.random.default_rng(positions)
    groups = -(-head_dim // 32)

    def stored() -> tuple[np.ndarray, np.ndarray]:
        codes = rng.integers(-127, 128, (positions, head_dim), np.int8)
        return codes, rng.uniform(0, 0.02, (positions, groups)).astype(np.float16)

    def plain(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        return codes.astype(np.float32) * np.repeat(scales, 32, 1)[:, :head_dim].astype(np.float32)

    key, value = stored(), stored()
    half = rng.normal(size=(positions, head_dim)).astype(np.float16)
    for tokens, heads, window in ((1, 1, 0), (1, 4, 0), (min(positions, 3), 5, 7), (min(positions, 8), 2, 0)):
        query = rng.normal(size=(tokens, heads, head_dim)).astype(np.float32) * 3
        seen = positions - tokens + 1
        for keys, values in ((key, value), (key, half), (half, value)):
            parts = [attend(table, query, keys, values, seen, 0.125, window) for table in (fast, SCALAR)]
            assert same_bits(*parts)
            for token in range(tokens):
                past = slice(max(0, seen + token - window) if window else 0, seen + token)
                k, v = (plain(*part) if isinstance(part, tuple) else part for part in (keys, values))
                expected = softmax_reference(query[token], k[past], v[past], 0.125)
                np.testing.assert_allclose(softmax_of(parts[1][token], head_dim), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [36, 64])
def test_joined_parts_are_the_softmax_over_both_chunks(fast, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    key, value = (rng.normal(size=(300, head_dim)).astype(np.float16) for _ in range(2))
    query = rng.normal(size=(1, 4, head_dim)).astype(np.float32) * 3
    chunks = slice(0, 256), slice(256, 300)
    joined = []
    for table in (fast, SCALAR):
        first, second = (attend(table, query, key[c], value[c], c.stop - c.start, 0.125)[0] for c in chunks)
        for head in range(4):
            table.join(pointer(first[head], "float"), pointer(second[head], "float"), head_dim)
        joined.append(first)
    assert same_bits(*joined)
    expected = softmax_reference(query[0], key, value, 0.125)
    np.testing.assert_allclose(softmax_of(joined[1], head_dim), expected, rtol=1e-4, atol=1e-5)


def test_a_value_that_is_not_a_number_stays_visible(fast) -> None:
    """A damaged file must end in NaN logits under every kernel, not in plausible ones under some."""
    one = np.ones(32, np.float32)
    gate, key = one.copy(), np.ones((2, 32), np.float16)
    gate[3] = key[1, 3] = np.nan
    for table in (fast, SCALAR):
        swished = guarded(gate)
        table.swiglu(pointer(swished, "float"), pointer(one, "float"), 32)
        assert np.array_equal(np.isnan(swished), np.isnan(gate))
        part = attend(table, one.reshape(1, 1, 32), key, key, 2, 0.1)[0, 0]
        assert np.isnan(softmax_of(part, 32)).all()
        other = attend(table, one.reshape(1, 1, 32), np.ones_like(key), np.ones_like(key), 2, 0.1)[0, 0]
        table.join(pointer(other, "float"), pointer(part, "float"), 32)
        assert np.isnan(softmax_of(other, 32)).all()
