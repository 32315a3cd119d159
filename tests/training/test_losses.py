"""A decoder's loss is that of the next token, as a mean over everything that is learnt."""

from types import SimpleNamespace

import pytest
import torch

from propulsion_export.training.encode import IGNORED
from propulsion_export.training.losses import (
    guesses_and_losses,
    mean_cross_entropy,
    mean_next_token_loss,
    next_token_losses,
    token_losses,
)

LABELS = torch.tensor([[IGNORED, IGNORED, 5, 6, 3], [IGNORED, 7, 3, IGNORED, IGNORED]])


@pytest.fixture(name="logits")
def make_logits():
    return torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_of_a_batch_is_the_models_own(kind, tiny_model):
    model = tiny_model(kind)
    ids = torch.tensor([[2, 9, 5, 6, 3], [2, 7, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    outputs = model(input_ids=ids, attention_mask=mask, labels=LABELS)

    torch.testing.assert_close(mean_next_token_loss(outputs, LABELS), outputs.loss)
    assert abs(mean_cross_entropy(outputs, LABELS) - outputs.loss) > 0.1


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_loss_of_an_encoder_decoder_is_the_models_own(kind, tiny_model):
    model = tiny_model(kind)
    labels = torch.tensor([[5, 6, 3], [7, 3, IGNORED]])

    outputs = model(input_ids=torch.tensor([[2, 9], [2, 7]]), labels=labels)

    torch.testing.assert_close(mean_cross_entropy(outputs, labels), outputs.loss)


def test_parts_of_a_batch_add_up_to_its_mean(logits):
    whole = mean_next_token_loss(SimpleNamespace(logits=logits), LABELS)

    parts = [
        mean_next_token_loss(
            SimpleNamespace(logits=logits[row : row + 1]), LABELS[row : row + 1], torch.tensor(5)
        )
        for row in range(2)
    ]

    torch.testing.assert_close(sum(parts), whole)


def test_a_tokens_loss_stands_where_the_token_stands(logits):
    losses = next_token_losses(logits, LABELS)

    expected = -logits[0, 1].log_softmax(-1)[5]
    torch.testing.assert_close(losses[0, 2], expected)
    assert (losses[LABELS == IGNORED] == 0).all()
    kept = losses[LABELS != IGNORED]
    torch.testing.assert_close(
        kept.mean(), mean_next_token_loss(SimpleNamespace(logits=logits), LABELS)
    )


def test_what_else_a_model_gives_changes_no_loss(logits):
    more = (logits, torch.zeros(2, 5, 4))

    assert torch.equal(next_token_losses(more, LABELS), next_token_losses(logits, LABELS))
    assert torch.equal(token_losses(more, LABELS), token_losses(logits, LABELS))
    torch.testing.assert_close(token_losses(logits, LABELS)[0, 2], -logits[0, 2].log_softmax(-1)[5])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_loss_of_a_row_with_a_class_that_is_no_number_is_nan(value):
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, value, 3.0], [3.0, 2.0, 1.0]])

    _, losses = guesses_and_losses(logits, torch.tensor([2, 2, 0]))

    assert losses.isnan().tolist() == [False, True, False]
