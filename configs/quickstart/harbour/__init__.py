"""The texts of the quickstart's dataset and of its model's pretraining, and the tokenizer made for them."""
