"""Mistakes with rows that users feed: long beside short, of one token, padded otherwise."""

from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.parity.probes import Limits
from propulsion_export.pipeline.parity import check_parity

PADDING = 0


def failed(report):
    return {check.case for check in report.checks if not check.passed}


def let_it_err(monkeypatch, mistake, *names):
    """Let what runs the artifact err with its inputs; `names`: which runners of a generator."""
    from propulsion_export.pipeline import parity

    right = parity.open_candidate

    def opened(*arguments, **options):
        run = right(*arguments, **options)
        if not names:
            return lambda feeds: run(mistake(feeds))
        return replace(run, **{name: wrong(getattr(run, name)) for name in names})

    def wrong(run):
        return lambda feeds: run(mistake(feeds))

    monkeypatch.setattr(parity, "open_candidate", opened)


def seen_from(column):
    """The mask is not read from a column on."""

    def mistake(feeds):
        (name,) = {"attention_mask", "encoder_attention_mask"} & feeds.keys()
        far = np.arange(feeds[name].shape[1]) >= column
        return {**feeds, name: np.where(far, 1, feeds[name])}

    return mistake


def tokens_from(column):
    """Rows behind the first are read up to a column only."""

    def mistake(feeds):
        ids = feeds["input_ids"].copy()
        ids[1:, column:] = 9
        return {**feeds, "input_ids": ids}

    return mistake


def types_from(column):
    def mistake(feeds):
        types = feeds["token_type_ids"].copy()
        types[:, column:] = 0
        return {**feeds, "token_type_ids": types}

    return mistake


def padding_hidden(feeds):
    """The mask is made of the tokens, too: padding is hidden."""
    new = feeds["input_ids"].shape[1]
    mask = feeds["attention_mask"].copy()
    mask[:, -new:] &= feeds["input_ids"] != PADDING
    return {**feeds, "attention_mask": mask}


def only_padding_hidden(feeds):
    new = feeds["input_ids"].shape[1]
    mask = feeds["attention_mask"].copy()
    mask[:, -new:] |= feeds["input_ids"] != PADDING
    return {**feeds, "attention_mask": mask}


def short_rows_wrong(length):
    def mistake(feeds):
        ids = feeds["input_ids"]
        return {**feeds, "input_ids": (ids + 7) % 100 if ids.shape[1] == length else ids}

    return mistake


def short_prompts_wrong(feeds):
    ids = feeds["input_ids"]
    prompt = ids.shape[1] == feeds["attention_mask"].shape[1] == 1
    return {**feeds, "input_ids": (ids + 7) % 100 if prompt else ids}


ENCODER = {
    "far token types not read": types_from(20),
    "padding hidden": padding_hidden,
    "only padding hidden": only_padding_hidden,
    "rows of one token": short_rows_wrong(1),
    "rows of two tokens": short_rows_wrong(2),
}
DECODER = {
    "the mask is not read far from the start": seen_from(64),
    "far tokens of the second row not read": tokens_from(64),
    "padding hidden": padding_hidden,
    "only padding hidden": only_padding_hidden,
    "prompts of one token": short_prompts_wrong,
}
ENCODER_DECODER = {
    "the mask is not read far from the start": seen_from(64),
    "padding hidden": padding_hidden,
    "only padding hidden": only_padding_hidden,
}


@pytest.mark.parametrize("name", ENCODER)
def test_a_mistake_of_an_encoder_fails(name, folded, monkeypatch):
    let_it_err(monkeypatch, ENCODER[name])

    assert "inputs" in failed(check_parity(folded))


@pytest.mark.parametrize("name", DECODER)
def test_a_mistake_of_a_decoder_fails(name, exported, monkeypatch):
    let_it_err(monkeypatch, DECODER[name], "run")

    assert "inputs" in failed(check_parity(exported("gpt2", "folded")))


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_a_mistake_of_an_encoder_decoder_fails(name, exported, monkeypatch):
    let_it_err(monkeypatch, ENCODER_DECODER[name], "encode")

    assert "inputs" in failed(check_parity(exported("bart", "folded")))


def test_what_the_artifact_does_not_take_is_told(folded, monkeypatch):
    monkeypatch.setattr(Limits, "of", lambda *arguments, **options: Limits(rows=1))

    report = check_parity(folded)

    assert report.passed
    told = {one.what: one for one in report.coverage}
    assert not told["a long row beside a short one"].covered
    assert told["a row of one token, and of two"].detail == "rows x tokens: 1 x 1, 1 x 2"
