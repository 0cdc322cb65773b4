"""Training in 16 bits, seen from Python: the loss scaler."""
