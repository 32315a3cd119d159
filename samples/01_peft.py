"""Propulsion in plain PEFT: attach it to a model, train one step, save it, load it again."""

import tempfile

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minilm import model_directory
from propulsion_export import PropulsionConfig

torch.manual_seed(0)
texts = ["a large wild cat", "a sharp tool for cutting"]
batch = AutoTokenizer.from_pretrained(model_directory())(texts, padding=True, return_tensors="pt")


def base() -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(model_directory(), num_labels=2)


config = PropulsionConfig(target_modules="attention", degree=15, task_type="SEQ_CLS")
model = peft.get_peft_model(base(), config)
model.print_trainable_parameters()

vectors = [value for name, value in model.named_parameters() if "propulsion_z" in name]
head = [value for name, value in model.named_parameters() if "modules_to_save" in name]
# No weight decay on the vectors: it would pull them to 0, and the identity is 1.
optimizer = torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": head}], lr=1e-3)
model(**batch, labels=torch.tensor([0, 1])).loss.backward()
optimizer.step()

with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    loaded = peft.PeftModel.from_pretrained(base(), directory)
with torch.no_grad():
    difference = (model.eval()(**batch).logits - loaded.eval()(**batch).logits).abs().max()
print(f"saved and loaded: the logits differ by {difference:.1e}")
assert difference == 0
