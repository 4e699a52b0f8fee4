"""What the scripts of this task share: texts, a tokenizer, a tiny Llama with LoRA, padded batches."""

import ast
import inspect
import os
import textwrap

import peft
import tokenizers
import transformers

EPOCHS = int(os.environ.get("TASK_EPOCHS", "3"))


def load_texts():
    """Return the source of functions of the standard library: to train on, and to validate on."""
    texts = set()
    for module in (ast, inspect, textwrap):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef):
                texts.add(ast.unparse(node)[:400])
    texts = sorted(texts)
    return [text for number, text in enumerate(texts) if number % 5], texts[::5]


def make_tokenizer(texts):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    )


def make_model(tokenizer):
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
    )
    lora = peft.LoraConfig(
        r=8,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(config), lora)


def tokenized(tokenizer, texts):
    """Return the ids of each text."""
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]


def make_collate(tokenizer):
    """Return a function that pads samples; `labels` are the ids, with -100 where there is padding."""
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
