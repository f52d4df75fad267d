"""The moving average: the formula, and that the model's own values come back."""

import pytest
import torch

from rlrr_kernels.finetune.trainer import Average


def test_it_is_the_exponential_average_from_the_first_values():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average, expected = Average({"p": parameter}, 0.9), torch.tensor([1.0, 2.0])
    for value in (3.0, -1.0, 5.0):
        with torch.no_grad():
            parameter.fill_(value)
        average.update()
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(average.values["p"], expected)


def test_the_model_holds_it_inside_and_its_own_values_afterwards_even_after_an_error():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = Average({"p": parameter}, 0.5)
    with torch.no_grad():
        parameter.fill_(3.0)
    average.update()

    def look():
        with average.in_place():
            assert parameter.item() == 2.0
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert parameter.item() == 3.0
    assert average.values["p"].item() == 2.0
