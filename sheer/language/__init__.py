"""Parts of language models that a step function calls: a loss without logits, masks of packed documents."""
