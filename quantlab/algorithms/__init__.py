"""One file per paper: pure functions of tensors."""
