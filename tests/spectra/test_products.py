"""Products with a few vectors, whatever the order of a matrix in memory."""

import pytest
import torch
from spectra_matrices import reference_kappa, relative_error

from kappa_lightning.spectra import spectrum
from kappa_lightning.spectra.products import gram_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["rows", "columns", "neither"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rows", [7, 64, 100])
def test_blocks_of_rows_give_the_product_with_the_gram_matrix(dtype, order, count, rows):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(count, 100, 40, generator=generator, dtype=dtype)
    block = torch.randn(1, 16, 40, generator=generator, dtype=dtype).expand(count, -1, -1)
    if order == "columns":
        matrix = matrix.mT.contiguous().mT
    if order == "neither":
        matrix = matrix.repeat_interleave(2, -1)[..., ::2]
    kept = matrix.clone(), block.clone()
    product = gram_product(block, matrix.split(rows, dim=-2))
    wanted = block.double() @ matrix.double().mT @ matrix.double()
    torch.testing.assert_close(product.double(), wanted, rtol=0, atol=2e-4 if dtype == torch.float32 else 1e-11)
    assert product.shape == block.shape
    assert torch.equal(matrix, kept[0])
    assert torch.equal(block, kept[1])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_square_matrices_are_left_as_they_are_in_either_order(transposed, dtype):
    """LU works in the memory of a copy, and κ does not depend on how the matrix lies in memory."""
    matrix = torch.randn(460, 460, generator=torch.Generator().manual_seed(2), dtype=dtype)
    given = matrix.mT.contiguous().mT if transposed else matrix
    result = spectrum(given)
    assert torch.equal(given, matrix)
    assert relative_error(result.kappa, reference_kappa(matrix.double().numpy())) <= float(result.rtol) <= 1e-3
