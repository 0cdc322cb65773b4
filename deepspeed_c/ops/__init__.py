"""Optimizers whose rule is in the C core: real torch.optim.Optimizers, with an engine and without."""
