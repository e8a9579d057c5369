"""The mathematics: model, prior, gradients, codec, adaptation. Knows tensors; knows no file of a bank.

Importing this package imports nothing heavy; its modules import torch.
"""
