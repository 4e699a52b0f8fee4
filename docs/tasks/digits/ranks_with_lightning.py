import lightning as L
import torch
from common import EPOCHS, Net, load_data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.net(batch["pixels"]), batch["labels"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, _):
        logits, labels = self.net(batch["pixels"]), batch["labels"]
        self.log("val/loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("val/accuracy", (logits.argmax(-1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


L.seed_everything(0)
train_data, val_data = load_data()
folder = "runs/digits-lightning"
checkpoint = ModelCheckpoint(folder, monitor="val/accuracy", mode="max", save_last=True)
trainer = L.Trainer(
    max_epochs=EPOCHS,
    devices=4,
    precision="bf16-mixed",
    gradient_clip_val=1.0,
    log_every_n_steps=10,
    callbacks=[checkpoint],
    logger=CSVLogger(folder),
)
trainer.fit(
    Digits(),
    DataLoader(train_data, batch_size=16, shuffle=True),
    DataLoader(val_data, batch_size=256),
    ckpt_path="last",
)
print(f"accuracy {checkpoint.best_model_score:.3f}")
