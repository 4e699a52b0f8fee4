from pathlib import Path

from common import EPOCHS, Classifier, collate, load_data
from sklearn.metrics import recall_score
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


class ClassifierTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(inputs["series"], inputs["lengths"])
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def recall(output):
    predicted = output.predictions.argmax(-1)
    return {"recall": recall_score(output.label_ids, predicted, average="macro")}


set_seed(0)
train_data, val_data = load_data()
arguments = TrainingArguments(
    "runs/lstm-transformers",
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=96,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    max_grad_norm=1.0,
    logging_steps=10,
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=2,
    load_best_model_at_end=True,
    metric_for_best_model="recall",
    label_names=["labels"],
    remove_unused_columns=False,
    report_to="none",
)
trainer = ClassifierTrainer(
    Classifier(),
    arguments,
    data_collator=collate,
    train_dataset=train_data,
    eval_dataset=val_data,
    compute_metrics=recall,
)
Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)  # by rank 0 only, later, if at all
trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
print(f"recall {trainer.state.best_metric:.3f}")
