from pathlib import Path

import torch
from common import EPOCHS, Net, load_data
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


class DigitsTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(inputs["pixels"])
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def accuracy(output):
    return {"accuracy": (output.predictions.argmax(-1) == output.label_ids).mean()}


set_seed(0)
train_data, val_data = load_data()
arguments = TrainingArguments(
    "runs/digits-transformers",
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=256,
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    weight_decay=0.01,
    bf16=True,
    use_cpu=not torch.cuda.is_available(),
    max_grad_norm=1.0,
    logging_steps=10,
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=2,
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    label_names=["labels"],
    remove_unused_columns=False,
    report_to="none",
)
trainer = DigitsTrainer(
    Net(), arguments, train_dataset=train_data, eval_dataset=val_data, compute_metrics=accuracy
)
Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)  # by rank 0 only, later, if at all
trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
print(f"accuracy {trainer.state.best_metric:.3f}")
