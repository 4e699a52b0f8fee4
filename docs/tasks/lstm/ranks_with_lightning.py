import lightning as L
import torch
from common import EPOCHS, Classifier, collate, load_data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassRecall


class LitClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Classifier()
        self.recall = MulticlassRecall(3)

    def training_step(self, batch, _):
        logits = self.model(batch["series"], batch["lengths"])
        loss = F.cross_entropy(logits, batch["labels"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, _):
        logits, labels = self.model(batch["series"], batch["lengths"]), batch["labels"]
        self.recall(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("val/recall", self.recall)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


L.seed_everything(0)
train_data, val_data = load_data()
folder = "runs/lstm-lightning"
checkpoint = ModelCheckpoint(folder, monitor="val/recall", mode="max", save_last=True)
trainer = L.Trainer(
    max_epochs=EPOCHS,
    devices=4,
    gradient_clip_val=1.0,
    log_every_n_steps=10,
    callbacks=[checkpoint],
    logger=CSVLogger(folder),
)
trainer.fit(
    LitClassifier(),
    DataLoader(train_data, batch_size=8, shuffle=True, collate_fn=collate),
    DataLoader(val_data, batch_size=96, collate_fn=collate),
    ckpt_path="last",
)
print(f"recall {checkpoint.best_model_score:.3f}")
