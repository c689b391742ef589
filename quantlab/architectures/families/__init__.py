"""The families of checkpoints, one file each; `quantlab.architectures.detect` lists them."""
