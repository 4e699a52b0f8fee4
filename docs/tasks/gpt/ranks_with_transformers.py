from pathlib import Path

import torch
from common import EPOCHS, GPT, load_data, loss_of
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


class GPTTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(inputs["codes"])
        loss = loss_of(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


set_seed(0)
train_data, val_data, characters = load_data()
model = GPT(characters)
arguments = TrainingArguments(
    "runs/gpt-transformers",
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=64,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    bf16=True,
    use_cpu=not torch.cuda.is_available(),
    max_grad_norm=1.0,
    logging_steps=10,
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=2,
    load_best_model_at_end=True,
    label_names=["labels"],
    prediction_loss_only=True,
    remove_unused_columns=False,
    report_to="none",
)
trainer = GPTTrainer(
    model,
    arguments,
    train_dataset=train_data,
    eval_dataset=val_data,
    optimizers=(torch.optim.AdamW(model.groups(), lr=3e-3, betas=(0.9, 0.95)), None),
)
Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)  # by rank 0 only, later, if at all
trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
print(f"loss {trainer.state.best_metric:.3f}")
