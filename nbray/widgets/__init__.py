"""The live views of the notebook: what they show, how it travels, and what stays of it."""
