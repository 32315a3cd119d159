"""The table of tasks agrees with transformers and optimum, and `auto` finds a task in it."""

import json
from dataclasses import replace

import pytest
from optimum.exporters.tasks import TasksManager

from propulsion_export.artifacts.typed_json import convert
from propulsion_export.base_model.tasks import TASKS, TaskName, resolve_task
from propulsion_export.errors import UsageError


@pytest.mark.parametrize("task", TASKS)
def test_auto_class_is_the_one_of_optimum(task):
    assert TASKS[task].auto_class == TasksManager.get_model_class_for_task(task).__name__


@pytest.mark.parametrize("task", TASKS)
def test_every_entry_has_the_name_it_is_found_by(task):
    assert TASKS[task].name == task
    assert convert(TaskName, task, "task") == task


def test_an_entry_is_all_that_a_new_task_needs(monkeypatch):
    with pytest.raises(ValueError, match="'scoring', expected one of feature-extraction"):
        convert(TaskName, "scoring", "task")
    with pytest.raises(UsageError, match="'scoring' is not supported"):
        resolve_task("scoring", [])
    entry = replace(TASKS["fill-mask"], name=TaskName("scoring"), class_endings=("ForScoring",))

    monkeypatch.setitem(TASKS, "scoring", entry)

    assert convert(TaskName, json.loads('"scoring"'), "task") == "scoring"
    assert resolve_task("scoring", []) == "scoring"
    assert resolve_task("auto", ["BertForScoring"]) == "scoring"


@pytest.mark.parametrize(
    ("architectures", "task"),
    [
        (["BertForSequenceClassification"], "text-classification"),
        (["RobertaForTokenClassification"], "token-classification"),
        (["BertForQuestionAnswering"], "question-answering"),
        (["DistilBertForMaskedLM"], "fill-mask"),
        (["BertModel"], "feature-extraction"),
        ([], "feature-extraction"),
    ],
)
def test_auto_is_the_task_of_the_architecture_when_no_adapter_names_one(architectures, task):
    assert resolve_task("auto", architectures) == task


def test_adapters_task_goes_before_the_architectures():
    architectures, adapters_for = ["BertForMaskedLM"], {"token-classification"}

    assert resolve_task("auto", architectures, adapters_for) == "token-classification"
    assert resolve_task("fill-mask", architectures, adapters_for) == "fill-mask"


def test_adapters_of_two_tasks_are_refused_with_both():
    with pytest.raises(UsageError, match="text-classification, token-classification"):
        resolve_task("auto", [], {"token-classification", "text-classification"})


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("T5ForConditionalGeneration", "text2text-generation"),
    ],
)
def test_generative_architecture_has_its_task(architecture, task):
    assert resolve_task("auto", [architecture]) == task


def test_unknown_task_is_refused():
    with pytest.raises(UsageError, match="'image-classification' is not supported"):
        resolve_task("image-classification", [])
