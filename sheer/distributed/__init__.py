"""Several ranks: who they are, how a model and its data are divided among them, and how they agree."""
