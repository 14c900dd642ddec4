import itertools

import numpy as np
import pytest
import torch

from kappa_lightning.fingerprint import fingerprint, hash_of_text

GOLDEN = 0x9E3779B97F4A7C15
MIX = 0xBF58476D1CE4E5B9
CHUNK = 1 << 15
MASK = (1 << 64) - 1


def reference(tensor):
    """Words mixed with their place and summed a chunk in NumPy's uint64, folded in Python's unbounded integers."""
    octets = tensor.contiguous().flatten().view(torch.uint8).numpy()
    words = np.concatenate([octets, np.zeros(-octets.size % 8, dtype=np.uint8)]).view("<u8")
    index = np.arange(1, CHUNK + 1, dtype=np.uint64)

    def shift(values, by):  # arithmetic: the sign bit fills from the left
        fill = (np.uint64(MASK) << np.uint64(64 - by)) * (values >> np.uint64(63))
        return (values >> np.uint64(by)) | fill

    mixed = index * np.uint64(GOLDEN)
    mixed = (mixed ^ shift(mixed, 29)) * np.uint64(MIX)
    weights = (mixed ^ shift(mixed, 32)) | np.uint64(1)

    total = 0
    for byte in f"{tensor.dtype} {tuple(tensor.shape)}".encode():
        total = ((total ^ byte) * GOLDEN) & MASK
    for start in range(0, words.size // CHUNK * CHUNK + 1, CHUNK):
        part, places = words[start : start + CHUNK], weights[: len(words[start : start + CHUNK])]
        part = (part ^ places) * np.uint64(GOLDEN)
        part = (part ^ shift(part, 32)) * places
        total = (total * GOLDEN + int(np.sum(part, dtype=np.uint64))) & MASK
    return f"{total:016x}"


def bits(shape, dtype, seed=0):
    """Random bit patterns, NaN and infinities included."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape)) * size
    octets = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return octets.view(dtype).reshape(shape)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 5), (64, 33)], ids=str)
def test_agrees_with_an_independent_implementation(dtype, shape):
    tensor = bits(shape, dtype)
    assert fingerprint(tensor) == reference(tensor)


@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        (CHUNK, torch.float32),
        (CHUNK + 1, torch.float32),
        (2 * CHUNK + 3, torch.float32),
        (2 * CHUNK + 3, torch.bfloat16),
        (4 * CHUNK + 5, torch.int8),
    ],
    ids=str,
)
def test_agrees_with_an_independent_implementation_beyond_a_chunk(count, dtype):
    tensor = bits((count,), dtype)
    assert fingerprint(tensor) == reference(tensor)


def test_empty_and_scalar_tensors_have_one():
    for tensor in (torch.empty(0), torch.empty(0, 3), torch.tensor(2.5), torch.empty(0, dtype=torch.int8)):
        assert fingerprint(tensor) == reference(tensor)
    assert fingerprint(torch.empty(0, 3)) != fingerprint(torch.empty(3, 0))


def test_is_sixteen_hexadecimal_digits_and_the_same_each_time():
    tensor = bits((9, 9), torch.float32)
    first = fingerprint(tensor)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert first == fingerprint(tensor.clone()) == fingerprint(torch.nn.Parameter(tensor.clone()))


def test_strides_do_not_matter():
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    wide = torch.zeros(6, 8)
    wide[:, ::2] = tensor
    same = [tensor.T.contiguous().T, wide[:, ::2], tensor.as_strided((6, 4), (4, 1)), tensor.unsqueeze(0)[0]]
    assert {fingerprint(other) for other in same} == {fingerprint(tensor)}
    assert fingerprint(torch.ones(1, 3).expand(4, 3)) == fingerprint(torch.ones(4, 3))
    image = torch.randn(2, 3, 4, 5)
    assert fingerprint(image.to(memory_format=torch.channels_last)) == fingerprint(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_place_inside_a_larger_storage_does_not_matter(dtype):
    flat = bits((41,), dtype)
    for start in range(5):
        view = flat[start : start + 36].view(6, 6)
        assert fingerprint(view) == fingerprint(view.clone()), start


def test_transpose_is_another_tensor():
    tensor = torch.randn(5, 5)
    assert fingerprint(tensor.T) != fingerprint(tensor)


def test_dtype_matters():
    values = [torch.zeros(8, dtype=dtype) for dtype in DTYPES]
    assert len({fingerprint(value) for value in values}) == len(values)
    same_bits = bits((4,), torch.float32)
    assert fingerprint(same_bits) != fingerprint(same_bits.view(torch.int32))


def test_shape_matters():
    flat = torch.arange(24.0)
    shapes = [(24,), (24, 1), (1, 24), (4, 6), (6, 4), (2, 3, 4), (12, 2), (1, 2, 12)]
    assert len({fingerprint(flat.reshape(shape)) for shape in shapes}) == len(shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_single_bit_matters(dtype):
    tensor = bits((7,), dtype)
    octets = tensor.view(torch.uint8)
    seen = {fingerprint(tensor)}
    for byte, bit in itertools.product(range(octets.numel()), range(8)):
        changed = octets.clone()
        changed[byte] ^= 1 << bit
        seen.add(fingerprint(changed.view(dtype)))
    assert len(seen) == 1 + 8 * octets.numel()


def test_sign_of_zero_matters():
    assert fingerprint(torch.tensor([0.0, 1.0])) != fingerprint(torch.tensor([-0.0, 1.0]))


def test_one_ulp_in_a_large_tensor_matters():
    tensor = torch.randn(CHUNK + 100, generator=torch.Generator().manual_seed(2))
    before = fingerprint(tensor)
    for place in (0, 12345, CHUNK - 1, CHUNK, CHUNK + 99):
        changed = tensor.clone()
        changed[place] = torch.nextafter(changed[place], torch.tensor(torch.inf))
        assert fingerprint(changed) != before


def test_swapped_elements_matter():
    tensor = torch.arange(1.0, 41.0)
    seen = {fingerprint(tensor)}
    pairs = list(itertools.combinations(range(40), 2))
    for first, second in pairs:
        swapped = tensor.clone()
        swapped[first], swapped[second] = tensor[second], tensor[first]
        seen.add(fingerprint(swapped))
    assert len(seen) == 1 + len(pairs)


def test_swapped_chunks_matter():
    first, second = torch.randn(CHUNK), torch.randn(CHUNK)
    assert fingerprint(torch.cat([first, second])) != fingerprint(torch.cat([second, first]))


def test_tensor_is_not_changed():
    tensor = bits((33,), torch.bfloat16)
    before = tensor.view(torch.uint8).clone()
    fingerprint(tensor)
    assert torch.equal(tensor.view(torch.uint8), before)


def test_hash_of_text_is_the_same_in_every_process():
    assert hash_of_text("") == 0
    assert hash_of_text("a") == ord("a") * GOLDEN & MASK
    assert hash_of_text("ab") != hash_of_text("ba")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_gives_the_same(dtype):
    tensor = bits((CHUNK + 7,), dtype)
    assert fingerprint(tensor.cuda()) == fingerprint(tensor)


@pytest.mark.parametrize("count", [1, 7, 64, (1 << 15) * 2 - 1, (1 << 15) * 2, (1 << 15) * 2 + 1])
def test_fingerprint_is_that_of_its_definition(count):
    """In whole numbers of Python, for one chunk and for several, as files of earlier versions have it."""
    tensor = torch.arange(count, dtype=torch.float32)
    golden, chunk, mask = 0x9E3779B97F4A7C15, 1 << 15, (1 << 64) - 1
    signed = lambda value: value - (1 << 64) if value >> 63 else value  # noqa: E731
    octets = tensor.numpy().tobytes()
    octets += bytes(-len(octets) % 8)
    words = [int.from_bytes(octets[at : at + 8], "little") for at in range(0, len(octets), 8)]
    weights = []
    for index in range(1, chunk + 1):
        value = index * golden & mask
        value = (value ^ (signed(value) >> 29) & mask) * 0xBF58476D1CE4E5B9 & mask
        weights.append((value ^ (signed(value) >> 32) & mask) | 1)
    total = 0
    for byte in f"torch.float32 ({count},)".encode():
        total = (total ^ byte) * golden & mask
    ends = [*range(chunk, len(words) + 1, chunk), None]
    for number, end in enumerate(ends):
        mixed = 0
        for word, weight in zip(words[number * chunk : end], weights, strict=False):
            value = (word ^ weight) * golden & mask
            value ^= (signed(value) >> 32) & mask
            mixed += value * weight
        total = (total * golden + mixed) & mask
    assert fingerprint(tensor) == f"{total:016x}"
