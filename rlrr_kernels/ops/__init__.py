"""The two ops, equals: a rescaled linear layer and a LayerNorm with an affine behind it, each with its gradients."""
