"""The bottom-up noise model of Sukhbaatar and Fergus (2014).

Row 5 of Xiao et al. (2015), Table 1. All images share one matrix Q (K, K), Q[i, j] =
p(noisy label i | true label j), counted on the clean set and held fixed. The network is
trained so that Q p(y | x) fits the noisy labels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nlhelpers import batches, losses, noise, training
from nlhelpers.data import UNKNOWN, NoisyData
from nlhelpers.methods.clean_only import train_on_clean
from nlhelpers.methods.noise_model import check_share, mixed_batches
from nlhelpers.training import Event, Setup


def bottom_up(
    data: NoisyData,
    setup: Setup,
    *,
    start_pretrained: bool = False,
    clean_share: float = 1 / 3,
) -> Iterator[Event]:
    """Train on the clean images, then on all images with the noise model on top.

    Args:
        data: images with noisy labels, and a clean set.
        setup: network and recipe, the same for all trainings.
        start_pretrained: whether the network starts pretrained, as in row 5.
        clean_share: share of clean images in a batch, as in `noise_model`.
    """
    check_share(clean_share)
    y, y_noisy = data.clean_labels, data.clean_given_labels
    pairs = y_noisy != UNKNOWN
    Q = noise.estimate_transition(y_noisy[pairs], y[pairs], data.num_classes).T.float()
    network = yield from train_on_clean(data, setup, start_pretrained=start_pretrained)
    images = batches.joined(data.clean_images, data.images)
    labels = torch.cat([y, data.labels])
    M = len(y)

    def step(network: nn.Module, index: Tensor, images: Tensor) -> Tensor:
        logits, label = network(images), labels[index]
        on_clean = losses.cross_entropy(logits, label)
        on_noisy = -noisy_log_likelihood(logits, label, Q)
        return torch.where(index < M, on_clean, on_noisy).mean()

    yield from training.fit(
        network,
        images,
        lambda: mixed_batches(data, setup, clean_share),
        step,
        setup,
        lambda network: training.accuracy(network, data.val_images, data.val_labels),
        stage="bottom-up",
    )


def noisy_log_likelihood(logits: Tensor, y_noisy: Tensor, Q: Tensor) -> Tensor:
    """Log (Q p)[y_noisy], per example, where p = softmax(logits).

    Args:
        logits: (N, K).
        y_noisy: (N,) int64.
        Q: (K, K), columns sum to 1.

    Returns:
        (N,), in nats. A confusion absent from the clean set is unlikely, not
        impossible.
    """
    return (Q.clamp(min=1e-6)[y_noisy].log() + logits.log_softmax(dim=1)).logsumexp(
        dim=1
    )
