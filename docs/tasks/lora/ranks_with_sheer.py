import sheer
import torch
from common import EPOCHS, load_texts, make_collate, make_model, make_tokenizer, tokenized
from torch.utils.data import DataLoader


def step(model, batch):
    tokens = (batch["labels"][:, 1:] != -100).sum()
    return {"loss": sheer.Mean(model(**batch).loss * tokens, tokens)}


sheer.seed_everything(0)
train_texts, val_texts = load_texts()
tokenizer = make_tokenizer(train_texts)
collate = make_collate(tokenizer)
train_data, val_data = tokenized(tokenizer, train_texts), tokenized(tokenizer, val_texts)
model = make_model(tokenizer)
trained = [p for p in model.parameters() if p.requires_grad]
trainer = sheer.Trainer(
    max_epochs=EPOCHS,
    gradient_clip_val=1.0,
    log_every_n_steps=5,
    monitor="val/loss",
    checkpoint=sheer.Checkpoint(every_n_epochs=1),
    run_dir="runs/lora-sheer",
    resume="auto",
)
result = trainer.fit(
    model,
    step,
    DataLoader(train_data, batch_size=16, shuffle=True, collate_fn=collate),
    DataLoader(val_data, batch_size=32, collate_fn=collate),
    optimizer=torch.optim.AdamW(trained, lr=3e-3),
    scheduler=sheer.warmup_linear(warmup_steps=5),
)
if trainer.rank == 0:
    sheer.load_weights(model, result.run_dir)
    model.save_pretrained(result.run_dir / "best")
print(f"loss {result.metrics['val/loss']:.3f}")
