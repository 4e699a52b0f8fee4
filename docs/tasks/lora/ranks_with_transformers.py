from pathlib import Path

from common import EPOCHS, load_texts, make_collate, make_model, make_tokenizer, tokenized
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


def token_losses(logits, labels):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def loss_over_tokens(output):
    counted = output.label_ids[:, 1:] != -100
    return {"token_loss": output.predictions[counted].mean()}


set_seed(0)
train_texts, val_texts = load_texts()
tokenizer = make_tokenizer(train_texts)
arguments = TrainingArguments(
    "runs/lora-transformers",
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=32,
    learning_rate=3e-3,
    lr_scheduler_type="linear",
    warmup_steps=5,
    weight_decay=0.01,
    max_grad_norm=1.0,
    logging_steps=5,
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=2,
    load_best_model_at_end=True,
    metric_for_best_model="token_loss",
    greater_is_better=False,
    report_to="none",
)
trainer = Trainer(
    make_model(tokenizer),
    arguments,
    data_collator=make_collate(tokenizer),
    train_dataset=tokenized(tokenizer, train_texts),
    eval_dataset=tokenized(tokenizer, val_texts),
    compute_metrics=loss_over_tokens,
    preprocess_logits_for_metrics=token_losses,
)
Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)  # by rank 0 only, later, if at all
trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
trainer.save_model("runs/lora-transformers/best")
print(f"loss {trainer.state.best_metric:.3f}")
