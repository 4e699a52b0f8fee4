"""Fine-tunes a causal language model of transformers by LoRA: a tokenizer trained on the spot, padded batches, a loss over tokens.

The model is tiny and new, since nothing is downloaded here; with a hub at hand the two lines marked below are all that changes.
About half a minute.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sheer


def functions() -> list[str]:
    """The source of the functions of a few modules of the standard library."""
    found = set()
    for module in ("argparse", "inspect", "pathlib", "textwrap", "typing"):
        source = Path(sysconfig.get_path("stdlib"), f"{module}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                found.add(textwrap.dedent(ast.get_source_segment(source, node, padded=True) or ""))
    return sorted(text for text in found if len(text) < 900)


def train_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1000, special_tokens=["<pad>", "<end>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def make_model(tokenizer: transformers.PreTrainedTokenizerFast) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def step(model: nn.Module, batch: dict[str, Any]) -> dict[str, sheer.Mean]:
    """A loss over tokens is returned as a mean with its count: batches have different numbers of them."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    following, counts = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), following, reduction="none")
    right = (logits.argmax(-1) == following).float()
    return {"loss": sheer.mean(losses, mask=counts), "accuracy": sheer.mean(right, mask=counts)}


def main() -> None:
    sheer.seed_everything(0)
    texts = functions()
    tokenizer = train_tokenizer(texts)  # with a hub: transformers.AutoTokenizer.from_pretrained("...")
    model = make_model(tokenizer)  # with a hub: transformers.AutoModelForCausalLM.from_pretrained("...")
    lora = peft.LoraConfig(
        r=16, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)

    def collate(texts: list[str]) -> Any:
        return tokenizer(
            texts, padding=True, truncation=True, max_length=256, return_tensors="pt", return_token_type_ids=False
        )

    held_out = texts[::8]
    trainer = sheer.Trainer(
        max_epochs=3,
        micro_batch_size=8,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        monitor="val/loss",
        run_dir="runs/finetune",
        resume="auto",
    )
    result = trainer.fit(
        model,
        step,
        DataLoader([text for text in texts if text not in held_out], batch_size=16, shuffle=True, collate_fn=collate),
        DataLoader(held_out, batch_size=32, collate_fn=collate),
        optimizer=lambda model: torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3),
        scheduler=sheer.warmup_linear(warmup_steps=5),
    )
    print(
        f"loss {result.metrics['val/loss']:.3f}, accuracy {result.metrics['val/accuracy']:.3f} over tokens not trained on"
    )

    model.save_pretrained(result.run_dir / "adapter")  # the model is your own: what it can do, it can still do
    tokenizer.save_pretrained(result.run_dir / "adapter")
    print(f"saved by save_pretrained in {result.run_dir / 'adapter'}")


if __name__ == "__main__":
    main()
