"""The paged KV cache: the accounts of its blocks, and the tensors behind them."""
