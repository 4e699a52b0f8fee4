"""What the scripts of this task share: the model, and series of 10 to 60 steps of three kinds."""

import math
import os

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

EPOCHS = int(os.environ.get("TASK_EPOCHS", "5"))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 32, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, series, lengths):  # [batch, time, 1] and [batch] -> [batch, kinds]
        packed = pack_padded_sequence(series, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return self.head(last[-1])


def make_wave(kind):
    phase = torch.rand(()) * 6 + torch.arange(int(torch.randint(10, 61, ()))) * 0.5
    wave = (phase.sin(), phase.sin().sign(), 1 - (phase / math.pi) % 2)[kind]
    return {"series": (wave + 0.2 * torch.randn(len(phase))).unsqueeze(1), "labels": kind}


def load_data():
    """Return series to train on and to validate on."""
    waves = [make_wave(number % 3) for number in range(1260)]
    return waves[:960], waves[960:]


def collate(samples):
    series = [sample["series"] for sample in samples]
    return {
        "series": pad_sequence(series, batch_first=True),
        "lengths": torch.tensor([len(one) for one in series]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }
